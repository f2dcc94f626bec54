"use strict";
(() => {
  function entry(list, text, href) {
    const item = document.createElement("li"), link = document.createElement("a");
    link.textContent = text;
    link.href = href;
    item.append(link);
    list.append(item);
  }

  addEventListener("DOMContentLoaded", () => {
    document.getElementById("pages").open = innerWidth > 900;
    const current = document.querySelector("[aria-current]"), sidebar = document.querySelector(".sidebar");
    if (current && innerWidth > 900) sidebar.scrollTop = current.offsetTop - innerHeight / 2;
    const search = document.getElementById("search"), found = document.getElementById("found");
    search.addEventListener("input", () => {
      found.replaceChildren();
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      if (!words.length) return;
      const hits = SEARCH.filter(page => words.every(word => page.text.includes(word)));
      const titled = page => words.every(word => page.title.toLowerCase().includes(word));
      hits.sort((a, b) => titled(b) - titled(a)).slice(0, 20).forEach(page => entry(found, page.title, page.link));
      if (!hits.length) found.textContent = "Nothing found.";
    });
    const contents = document.getElementById("contents");
    if (contents) document.querySelectorAll("main h2[id]").forEach(heading => {
      const text = heading.cloneNode(true);
      text.querySelectorAll(".anchor-link").forEach(link => link.remove());
      entry(contents, text.textContent, "#" + encodeURIComponent(heading.id));
    });
  });
})();
