"""lm_eval's own command line, told where the data lies: the first argument is a folder laid out like the hub."""

import os
import sys

import datasets

original = datasets.load_dataset
mirror = sys.argv.pop(1)


def load_dataset(path, name=None, **kwargs):
    folder = os.path.join(mirror, path)
    return original(folder if os.path.isdir(folder) else path, name, **kwargs)


datasets.load_dataset = load_dataset

from lm_eval.__main__ import cli_evaluate  # noqa: E402

cli_evaluate()
