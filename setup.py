"""Package metadata, read from settings.ini so that nbdev and pip see one source."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def split(key):
    "The space-separated entries of one settings.ini key."
    return settings[key].split()


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["krause_repro", "krause_repro.*"]),
    package_data={"krause_repro": ["*.json", "csrc/*", "templates/*.j2", "templates/*.css", "templates/*.js", "templates/interactive/*",
                                   "tasks/*.yaml", "tasks/items/*.json"]},
    install_requires=split("requirements"),
    extras_require={"dev": split("dev_requirements"), "eval": split("eval_requirements")},
    entry_points={
        "console_scripts": split("console_scripts"),
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
