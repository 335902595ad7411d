"""What pyproject.toml cannot say: configurations and the small model go into the wheel, as data below ldm/shipped."""

from setuptools import find_packages, setup

SHIPPED = {"ldm.shipped.configs": "configs", "ldm.shipped.models.demo": "models/demo"}

setup(
    packages=[*find_packages(include=["ldm", "ldm.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "ldm": ["py.typed", "page/*.css"],
        "ldm.shipped.configs": ["demo/*.yaml", "stable-diffusion/*.yaml"],
        "ldm.shipped.models.demo": [
            "model.*",
            "presets.yaml",
            "README.md",
            "concepts/*",
            "references/*/*",
            "tokenizer/*",
        ],
    },
    include_package_data=False,
)
