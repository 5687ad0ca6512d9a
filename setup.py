"""Where the packages lie: `models/` and `bench/` install as skiparse.models and skiparse.bench."""

from setuptools import setup

setup(
    packages=[
        "skiparse",
        "skiparse.backends",
        "skiparse.backends.triton",
        "skiparse.models",
        "skiparse.models.data",
        "skiparse.models.suv",
        "skiparse.models.train",
        "skiparse.models.wfvae",
        "skiparse.bench",
    ],
    package_dir={
        "skiparse": "skiparse",
        "skiparse.models": "models",
        "skiparse.bench": "bench",
    },
    package_data={"skiparse": ["py.typed", "orders/*.json"], "skiparse.models.train": ["*.yaml"]},
)
