"""`python -m tests.campaign.command ARGUMENTS`: `krause-repro` in the current folder, a project of the campaign, with its tiny recipes."""

import os
import sys

from tests.campaign.common import main, register
from tests.campaign.processes import in_double, sized

if __name__ == "__main__":
    recipes = register()
    if count := os.environ.get("CAMPAIGN_EXAMPLES"):
        sized(recipes, int(count))
    if os.environ.get("CAMPAIGN_DOUBLE"):
        in_double()
    sys.exit(main(sys.argv[1:]))
