"""Prints the custom resource definition of ModelPool: ``python -m autoscaler.operator``."""

from __future__ import annotations

import sys

import yaml

from autoscaler.operator.model_pool import make_crd

sys.stdout.write(
    "# Made by `python -m autoscaler.operator`, from the classes that read a ModelPool.\n"
)
yaml.safe_dump(make_crd(), sys.stdout, sort_keys=False, width=100)
