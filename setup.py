"Package metadata, read from settings.ini, so that each figure stands in one place."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

extras = {name: cfg[f"{name}_requirements"].split() for name in ("lab", "dask", "elsewhere", "bench", "dev")}
extras["dev"] += extras["lab"] + extras["dask"] + extras["elsewhere"]

readme = here / "README.md"
setup(
    name=cfg["lib_name"].replace("_", "-"),
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="MIT",
    keywords=cfg["keywords"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["static/*.js", "static/*.css", "static/*.z"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": ["adaptive-lab = adaptive_lab.cli:main"],
        # What a recipe may be built from. Another package adds its own parts under the same group.
        "adaptive_lab.parts": [
            "digits = adaptive_lab.data.digits",
            "text = adaptive_lab.data.text",
            "models = adaptive_lab.models",
            "adaptive_transformer = adaptive_lab.controller.edits",
            "controlled_adam = adaptive_lab.controller.controlled_adam",
            "dialects = adaptive_lab.data.dialects",
            "byte_model = adaptive_lab.bytropix.recipe",
            "hakmem = adaptive_lab.hakmem.optimizer",
            "hakmem.rate = adaptive_lab.hakmem.rate",
            "optimizers = adaptive_lab.optimizers",
            "zoo = adaptive_lab.zoo",
            "plasticity = adaptive_lab.plasticity",
            "continual = adaptive_lab.continual",
            "peers.continual = adaptive_lab.peers.continual",
            "peers.regularizers = adaptive_lab.peers.regularizers",
            "peers.projections = adaptive_lab.peers.projections",
            "valued_adam = adaptive_lab.valued_adam",
            "vwpr_method = adaptive_lab.vwpr_method",
            "reweighting = adaptive_lab.reweighting",
            "peers.reweighting = adaptive_lab.peers.reweighting",
            "peers.metaweights = adaptive_lab.peers.metaweights",
            "peers.trees = adaptive_lab.peers.trees",
        ],
    },
    zip_safe=False,
)
