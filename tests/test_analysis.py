"""Quantities of attention and tokens: by independent loops, at their bounds, and taken out of real models."""

import itertools
import math

import pytest
import torch
from cases import over
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from krause_repro.attention_analysis import (
    analyse,
    attention_distance,
    attention_entropy,
    collect_attention,
    effective_rank,
    grid_positions,
    head_diversity,
    map_row,
    query_rows,
    query_token,
    rank_residual,
    summarise_analysis,
    test_pixels,
    token_clusters,
    token_cosine,
)
from krause_repro.branched_models import add_krause_branch, recorded_branches
from krause_repro.recipes import get_recipe
from krause_repro.reference import CausalWindow
from krause_repro.sinks import (
    first_token_attention,
    received_attention,
    sink_profile,
    sink_quantities,
    sink_verdict,
    summarise_sinks,
    uniform_attention,
    uniform_share,
    value_ratio,
)
from krause_repro.swin import SwinClassifier, SwinClassifierConfig
from krause_repro.vision_transformer import VisionTransformer, VisionTransformerConfig

RECIPE = get_recipe("kvit_t/fashion_mnist").at("smoke")


def rows(*shape, seed=0, keep=None):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    if keep is not None:
        logits = logits.where(logits >= logits.topk(keep, -1).values[..., -1:], -torch.inf)
    return logits.softmax(-1)


@pytest.fixture(scope="module")
def kvit():
    torch.manual_seed(0)
    return VisionTransformer(RECIPE.config)


# Weights


@pytest.mark.parametrize("keep", [None, 2])
def test_entropy_by_a_loop(keep):
    weights = rows(2, 3, 4, 5, keep=keep)
    wanted = [[sum(-p * math.log(p) for q in head.tolist() for p in q if p) / 4 for head in image] for image in weights]
    assert torch.allclose(attention_entropy(weights), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_head_diversity_by_a_loop(keep):
    weights = rows(2, 3, 4, 5, keep=keep)

    def divergence(p, q):
        mixed = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return sum(x * math.log2(x / m) / 2 for side in (p, q) for x, m in zip(side, mixed, strict=True) if x)

    for image, found in zip(weights.tolist(), head_diversity(weights), strict=True):
        pairs = [math.sqrt(divergence(a[t], b[t])) for a, b in itertools.combinations(image, 2) for t in range(4)]
        assert found.item() == pytest.approx(sum(pairs) / len(pairs))


@given(seed=st.integers(0, 10**6), heads=st.integers(2, 5), keys=st.integers(1, 9))
def test_head_diversity_is_bounded_and_ignores_the_order_of_heads(seed, heads, keys):
    weights = rows(1, heads, 3, keys, seed=seed)
    found = head_diversity(weights)
    assert 0 <= found <= 1 and torch.allclose(found, head_diversity(weights.flip(1)))
    assert torch.allclose(head_diversity(weights[:, :1].expand(-1, heads, -1, -1)), torch.zeros(1, dtype=torch.float64), atol=1e-7)


def test_one_head_has_no_diversity():
    with pytest.raises(ValueError, match="at least two heads"):
        head_diversity(rows(1, 1, 3, 3))


def test_distance_by_a_loop_without_the_cls_token():
    weights, places = rows(2, 2, 10, 10), grid_positions(3)
    assert places[0].isnan().all() and places[1:].tolist() == [[i // 3, i % 3] for i in range(9)]
    for image, head in itertools.product(range(2), range(2)):
        a = weights[image, head].tolist()
        apart = torch.cdist(places[1:], places[1:]).tolist()
        each = [sum(w * d for w, d in zip(a[i][1:], apart[i - 1], strict=True)) / sum(a[i][1:]) for i in range(1, 10)]
        assert attention_distance(weights, places)[image, head].item() == pytest.approx(sum(each) / 9, rel=1e-6)


def test_a_query_that_sees_the_cls_token_alone_does_not_count():
    weights = torch.zeros(1, 1, 5, 5)
    weights[0, 0, :, 0] = 1
    weights[0, 0, 1] = torch.tensor([0.5, 0.0, 0.25, 0.0, 0.25])  # the corner: half of the rest right of it, half diagonal
    assert attention_distance(weights, grid_positions(2)).item() == pytest.approx((1 + math.sqrt(2)) / 2)


def test_places_must_fit_the_weights():
    with pytest.raises(ValueError, match="positions must have a row for each token"):
        attention_distance(rows(1, 1, 5, 5), grid_positions(3))


# Tokens


def test_cosine_by_a_loop():
    states = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for image, found in zip(states, token_cosine(states), strict=True):
        pairs = [torch.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(image, 2)]
        assert found.item() == pytest.approx(sum(pairs).item() / len(pairs))
    with pytest.raises(ValueError, match="at least two tokens"):
        token_cosine(states[:, :1])


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
def test_quantities_of_tokens_ignore_scale_and_rotation(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 7, 5, dtype=torch.float64, generator=generator)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator)).Q
    for measure in (token_cosine, rank_residual, effective_rank):
        assert torch.allclose(measure(states), measure(scale * states @ turn), atol=1e-9)


def test_residual_and_rank_at_their_bounds():
    common, spread = torch.ones(1, 6, 4), torch.cat([torch.eye(3), -torch.eye(3)]).unsqueeze(0)
    assert rank_residual(common).item() == pytest.approx(0, abs=1e-6) and rank_residual(spread).item() == pytest.approx(1)
    assert effective_rank(common).item() == pytest.approx(1, abs=1e-4) and effective_rank(spread).item() == pytest.approx(3)
    two = torch.diag(torch.tensor([3.0, 1.0])).unsqueeze(0)  # singular values 3 and 1
    assert effective_rank(two).item() == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_groups_are_chains_of_like_directions():
    angles = torch.deg2rad(torch.tensor([0.0, 20, 40, 120, 135, 250]))  # cos 20° = 0.94, cos 25.8° = 0.9
    states = torch.stack([angles.cos(), angles.sin()], -1).unsqueeze(0) * torch.tensor([1.0, 9, 2, 5, 1, 3]).view(1, 6, 1)
    assert token_clusters(states).tolist() == [3]  # a chain of three, a pair, and one alone
    assert token_clusters(states, cosine=0.95).tolist() == [5]
    assert token_clusters(states, cosine=-1).tolist() == [1]
    assert token_clusters(torch.ones(1, 4, 3), cosine=1).tolist() == [1]
    with pytest.raises(ValueError, match="cosine must be between -1 and 1"):
        token_clusters(states, cosine=1.5)


# Models


@pytest.mark.parametrize(("model", "inputs", "shape"), [
    (VisionTransformer(VisionTransformerConfig(image_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)),
     {"pixel_values": torch.randn(3, 3, 8, 8)}, (3, 2, 5, 5)),
    (SwinClassifier(SwinClassifierConfig(image_size=16, embed_dim=8, depths=(1, 1), num_heads=(2, 2))),
     {"pixel_values": torch.randn(3, 3, 16, 16)}, (3, 2, 16, 16)),
    (GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11, attn_implementation="eager")),
     {"input_ids": torch.arange(7).view(1, 7)}, (1, 2, 7, 7)),
])
def test_weights_of_different_models(model, inputs, shape):
    model.train()
    weights = collect_attention(model, **inputs)
    assert model.training and tuple(weights[0].shape) == shape and len(weights) == 2
    assert all(torch.allclose(layer.sum(-1), torch.ones(layer.shape[:-1]), atol=1e-5) for layer in weights)


def test_a_model_that_keeps_its_weights_to_itself_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa"))
    with pytest.raises(ValueError, match="LlamaForCausalLM returned no attention weights.*eager"):
        collect_attention(llama, input_ids=torch.arange(5).view(1, 5))


def test_tokens_of_swin_shrink_with_its_maps():
    swin = SwinClassifier(SwinClassifierConfig(image_size=16, embed_dim=8, depths=(1, 1), num_heads=(2, 2)))
    weights, states = collect_attention(swin, states=True, pixel_values=torch.randn(2, 3, 16, 16))
    assert [tuple(layer.shape) for layer in states] == [(2, 16, 8), (2, 16, 8), (2, 4, 16)] and len(weights) == 2


def test_analysis_is_the_mean_over_images_of_all_batches(kvit):
    images = torch.randn(70, 1, 28, 28, generator=torch.Generator().manual_seed(2))  # two batches
    whole = analyse(kvit, images)
    weights, states = collect_attention(kvit, states=True, pixel_values=images)
    assert whole["entropy"] == pytest.approx([attention_entropy(layer).mean().item() for layer in weights], rel=1e-5)
    assert whole["distance"] == pytest.approx([attention_distance(layer, grid_positions(7)).mean().item() for layer in weights], rel=1e-5)
    assert whole["clusters"] == pytest.approx([token_clusters(layer).double().mean().item() for layer in states])
    assert len(whole["cosine"]) == 3 and len(whole["head_diversity"]) == 2  # the tokens also before the first layer
    assert grid_positions(2, 3)[1:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    found = summarise_analysis([analyse(kvit, images)] * 2)
    assert found["entropy"]["mean"] == pytest.approx(whole["entropy"]) and found["entropy"]["sd"] == pytest.approx([0, 0], abs=1e-12)


def test_rows_of_a_query_are_the_models(kvit):
    image = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    example = {"pixel_values": image, "labels": torch.tensor(0)}
    pixels = test_pixels(RECIPE, [example, example], 1)
    assert pixels.shape == (1, 1, 28, 28)
    for query, token in (("cls", 0), ([0, 0], 1), ([2, 3], 18), ([6, 6], 49)):
        assert query_token(query, 7) == token
        wanted = torch.stack([layer[0, :, token] for layer in collect_attention(kvit, pixel_values=pixels)])
        found = query_rows(kvit, RECIPE, image, query)
        assert torch.equal(found, wanted) and found.shape == (2, 2, 50)
    row = map_row(found[0], image, [6, 6], label="KViT", kind="krause")
    assert torch.allclose(torch.tensor(row["image"]), image[0] / 255, atol=6e-4) and (row["label"], row["query"]) == ("KViT", [6, 6])
    for weights, hub in zip(row["maps"], row["cls_weight"], strict=True):
        assert sum(weights) + hub == pytest.approx(1, abs=1e-3) and {i for i, w in enumerate(weights) if w} <= {48, 47, 41}


@pytest.mark.parametrize("query", [[7, 0], [0, -1], [1], "centre"])
def test_a_query_outside_of_the_grid_is_refused(query):
    with pytest.raises(ValueError, match="query must be 'cls' or"):
        query_token(query, 7)


@pytest.mark.parametrize("count", [0, 3])
def test_more_images_than_there_are_cannot_be_taken(count):
    example = {"pixel_values": torch.zeros(1, 28, 28, dtype=torch.uint8), "labels": torch.tensor(0)}
    with pytest.raises(ValueError, match="count must be between 1 and 2"):
        test_pixels(RECIPE, [example, example], count)


def sinky(length=20, share=0.6, place=0):
    "Causal attention that gives `share` to one token, from that token on, and the rest to the query itself."
    weights = torch.eye(length, dtype=torch.float64) * (1 - share)
    weights[place:, place] += share
    weights[:place] = torch.eye(length, dtype=torch.float64)[:place]
    weights[place] = torch.eye(length, dtype=torch.float64)[place]
    return weights.expand(2, 3, length, length)


def test_first_token_attention_tells_a_sink_from_a_window():
    window = CausalWindow(5).mask(20)
    whole = sinky()
    cut = whole * window
    cut = cut / cut.sum(-1, keepdim=True)
    for weights, far in ((whole, 0.6), (cut, 0.0)):
        told = first_token_attention(weights, 5)
        assert_close(told["first_near"], torch.full((2,), 0.6, dtype=torch.float64))
        assert_close(told["first_far"], torch.full((2,), far, dtype=torch.float64))
        assert_close(told["first_all"], torch.full((2,), (4 * 0.6 + 15 * far) / 19, dtype=torch.float64))
    for wrong in (1, 20):
        with pytest.raises(ValueError, match="window must be between 2 and 19"):
            first_token_attention(whole, wrong)


def test_uniform_attention_in_closed_form():
    told = first_token_attention(uniform_attention(10), 4)
    assert told["first_near"].item() == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert told["first_all"].item() == pytest.approx(sum(1 / n for n in range(2, 11)) / 9)
    assert first_token_attention(uniform_attention(10, 4), 4)["first_far"].item() == 0


@pytest.mark.parametrize("place", [0, 7])
def test_received_attention_finds_the_sink_wherever_it_is(place):
    weights, uniform = sinky(place=place), uniform_share(20)
    expected = torch.zeros(16, dtype=torch.float64)
    expected[place] = 0.6 * (place + 3.5)  # the four queries after it see place + 2 … place + 5 keys
    assert_close(received_attention(weights, 5, uniform), expected.expand(2, 16))
    told = sink_quantities(weights, 5, uniform)
    assert told["place"].tolist() == [place] * 2 and told["most"].tolist() == pytest.approx([expected[place].item()] * 2)
    assert told["most_later"].tolist() == pytest.approx([expected[place].item() if place else 0.0] * 2)


def test_uniform_attention_gives_every_token_the_same():
    for window in (None, 4, 1000):
        assert uniform_share(9, window).tolist() == pytest.approx([1 / min(i + 1, window or 9) for i in range(9)])
        assert_close(received_attention(uniform_attention(12, window), 4, uniform_share(12, window)), torch.ones(1, 9).double())
    whole, near, gate = uniform_attention(12), uniform_attention(12, 4), torch.rand(2, 12).double()
    mixed = torch.lerp(near, whole, gate[:, None, :, None])
    share = torch.lerp(uniform_share(12, 4).double(), uniform_share(12).double(), gate)
    assert_close(received_attention(mixed, 4, share), torch.ones(2, 9).double())


def test_received_attention_is_the_sum_written_out():
    weights = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double().tril()
    for uniform, seen in ((uniform_share(12), range(1, 13)), (uniform_share(12, 4), [1, 2, 3, *[4] * 9])):
        expected = [[sum(weights[b, :, i, j].mean() * seen[i] for i in range(j + 1, j + 4)) / 3 for j in range(9)] for b in range(2)]
        assert_close(received_attention(weights, 4, uniform), torch.tensor(expected, dtype=torch.float64))


def test_sink_profile_is_what_the_layers_do():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2)).eval()
    tokens = torch.randint(61, (5, 24))
    base = sink_profile(model, tokens, window=6)
    assert set(base) == {"softmax"} and model.config._attn_implementation != "eager"
    add_krause_branch(model, window=6, top_k=3, gate_init=0.6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    profile = sink_profile(model, tokens, window=6, batch=2)
    assert all(rows.shape == (2, 5) for told in profile.values() for rows in told.values())
    assert not profile["krause"]["first_far"].any() and (profile["softmax"]["first_far"] > 0).all()
    model.set_attn_implementation("eager")
    with torch.no_grad(), recorded_branches() as records:
        weights = model(tokens, output_attentions=True).attentions
    for i in range(2):
        assert_close(profile["softmax"]["first_all"][i], weights[i][..., 1:, 0].mean((1, 2)))
        mixed = records[i]["gate"][:, None] * weights[i][..., 0] + (1 - records[i]["gate"][:, None]) * records[i]["weights"][..., 0]
        assert_close(profile["mixed"]["first_all"][i], mixed[..., 1:].mean((1, 2)))
        assert_close(profile["mixed"]["gate"][i], records[i]["gate"].mean(1))
        gate, near, whole = records[i]["gate"], uniform_share(24, 6), uniform_share(24)
        mass = gate[:, None, :, None] * weights[i] + (1 - gate[:, None, :, None]) * records[i]["weights"]
        for kind, kept, uniform in (("softmax", weights[i], whole), ("krause", records[i]["weights"], near),
                                    ("mixed", mass, gate * whole + (1 - gate) * near)):
            assert_close(profile[kind]["most"][i], received_attention(kept, 6, uniform).amax(1))
    summary = summarise_sinks(profile)
    assert summary["krause"]["first_near"]["n"] == 5 and 0 <= summary["softmax"]["first_is_most"]["mean"][0] <= 1
    assert summary["softmax"]["first_all"]["mean"] == pytest.approx(profile["softmax"]["first_all"].double().mean(1).tolist())
    with pytest.raises(ValueError, match="window must be 6, the branch's, got 32"):
        sink_profile(model, tokens)


@pytest.mark.parametrize("training", [True, False])
def test_sink_profile_leaves_the_model_in_its_mode(training):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).train(training)
    sink_profile(model, torch.randint(11, (1, 8)), window=3)
    assert model.training == model.get_decoder().layers[0].training == training
    with pytest.raises(ValueError, match="window must be between"):
        sink_profile(model, torch.randint(11, (1, 8)), window=8)
    assert model.training == training


def test_value_ratio_of_a_small_first_value():
    values = torch.ones(1, 4, 6)
    values[:, 0] = 0.5
    assert_close(value_ratio(values, 3), torch.tensor([0.5]))


# What has no number


WEIGHTS, STATES = rows(2, 3, 4, 4), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
MEASURES = {
    "attention_entropy": (attention_entropy, WEIGHTS), "head_diversity": (head_diversity, WEIGHTS),
    "attention_distance": (lambda weights: attention_distance(weights, torch.arange(8.0).view(4, 2)), WEIGHTS),
    "first_token_attention": (lambda weights: first_token_attention(weights, 2), WEIGHTS),
    "received_attention": (lambda weights: received_attention(weights, 2, uniform_share(4)), WEIGHTS),
    "sink_quantities": (lambda weights: sink_quantities(weights, 2, uniform_share(4)), WEIGHTS),
    "token_cosine": (token_cosine, STATES), "rank_residual": (rank_residual, STATES), "effective_rank": (effective_rank, STATES),
    "token_clusters": (token_clusters, STATES), "value_ratio": (lambda values: value_ratio(values, 2), STATES),
}


def spoilt(x, value):
    x = x.clone()
    x.view(-1)[3] = value
    return x


@over("name", MEASURES)
@over(("change", "message"), [
    (lambda x: spoilt(x, math.nan), "must be finite, and 1 of [0-9]+ numbers are NaN or infinite"),
    (lambda x: spoilt(x, math.inf), "must be finite"),
    (lambda x: x[:0], "no dimension of 0"), (lambda x: x[0], "must be a floating tensor"),
    (lambda x: x.long(), "must be a floating tensor"),
    (lambda x: x.tolist(), "must be a floating tensor .*, got list"),
])
def test_what_no_number_can_come_of_is_named(name, change, message):
    measure, right = MEASURES[name]
    measure(right)
    with pytest.raises(ValueError, match=message):
        measure(change(right))


@pytest.mark.parametrize("call", [
    lambda: rank_residual(torch.zeros(1, 3, 4)), lambda: effective_rank(torch.zeros(1, 3, 4)),
    lambda: value_ratio(torch.zeros(1, 3, 4), 2),
    lambda: attention_distance(torch.eye(5)[:1].expand(1, 1, 5, 5), grid_positions(2)),  # all weight on the CLS token
])
def test_a_division_by_zero_is_an_error(call):
    with pytest.raises(ValueError, match="is not defined here"):
        call()


@pytest.mark.parametrize("place", range(4))
def test_nothing_is_said_of_a_sink_that_is_not_a_number(place):
    numbers = [0.3, 0.1, 0.4, 0.1]
    assert sink_verdict(*numbers) == "present"
    numbers[place] = math.nan
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        sink_verdict(*numbers)


def test_a_diverged_model_has_no_analysis(kvit):
    broken = VisionTransformer(RECIPE.config)
    broken.load_state_dict({name: torch.full_like(x, math.nan) for name, x in kvit.state_dict().items()})
    with pytest.raises(ValueError, match="weights must be finite.*has the model diverged"):
        analyse(broken, torch.zeros(1, 1, 28, 28))
    for call, message in ((lambda: analyse(kvit, torch.zeros(0, 1, 28, 28)), "pixel_values must be"),
                          (lambda: summarise_analysis([]), "found must hold the quantities of a model")):
        with pytest.raises(ValueError, match=message):
            call()
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=11))
    for tokens in (torch.zeros(0, 8, dtype=torch.long), torch.zeros(8, dtype=torch.long)):
        with pytest.raises(ValueError, match="tokens must be of shape"):
            sink_profile(model, tokens, window=3)
    model.get_input_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="weights must be finite"):
        sink_profile(model, torch.zeros(1, 8, dtype=torch.long), window=3)
