"""Build script. It imports neither torch nor Triton and asks no driver, so that it builds anywhere."""

from setuptools import setup

setup()
