"""Labels of data files: classes by number or name, and numbers to predict."""

import re
from collections.abc import Mapping
from typing import Any

from twa_scale.base.inputs import brief
from twa_scale.base.names import nearest, quoted
from twa_scale.base.notices import notice
from twa_scale.errors import ConfigError

Label = str | int
_DEFAULT = re.compile(r"LABEL_\d+")  # the names that transformers gives to classes without names
_FRACTION = re.compile(r"-?\d*\.\d+")


def require_label(label: Any, location: str) -> None:
    """Check that a label is a class. Lists, empty strings and NaN would become separate classes.

    Raises:
        ConfigError: names the place.
    """
    if isinstance(label, list | dict) or label == "" or label != label:
        raise ConfigError(f"{location}: {brief(label)} is not a label. Give a name or an integer.")
    if (isinstance(label, float) and not label.is_integer()) or (_FRACTION.fullmatch(str(label)) and float(label) % 1):
        raise ConfigError(
            f"{location}: {brief(label)} is not a class. Set task.problem: regression to predict numbers."
        )


def class_labels(labels: list[Any]) -> list[Label]:
    """Return labels as integers if all of them are integers, also as text, otherwise as names."""
    try:
        return [int(label) if isinstance(label, float) else int(str(label)) for label in labels]
    except ValueError:
        return [str(label) for label in labels]


def numbering(labels: Mapping[str, list[Label]], known: Mapping[str, int]) -> dict[Label, int]:
    """Return the class number of each label.

    Names have the numbers of the model if it knows all of them. Otherwise they are numbered in sorted order.

    Args:
        labels: the labels of each split.
        known: the `label2id` of the model.

    Raises:
        ConfigError: a name that the model does not know is in another split, but not in `train`.
    """
    present = {label for column in labels.values() for label in column}
    if all(isinstance(label, int) for label in present):
        return {i: i for i in {*present, *range(max(int(label) for label in present) + 1)}}
    names = sorted(str(label) for label in present)
    if set(names) <= set(known):
        return {name: known[name] for name in known}
    _refuse_new_labels(labels)
    named = [name for name in known if not _DEFAULT.fullmatch(name)]
    if named and len(names) <= len(known):
        unknown = next(name for name in names if name not in known)
        notice(
            f"task: the classes are numbered in sorted order, because the model's label2id has other names: "
            f"{quoted(named)}, but not {unknown!r}. If the candidates were trained with that label2id, use its names."
        )
    return {name: number for number, name in enumerate(names)}


def require_number(label: Any, location: str) -> None:
    """Check that a label is a finite number, also as text.

    Raises:
        ConfigError: names the place.
    """
    try:
        finite = abs(float(label)) < float("inf")
    except (TypeError, ValueError):
        finite = False
    if not finite:
        raise ConfigError(f"{location}: {brief(label)} is not a finite number, which regression needs as a label.")


def default_names(known: Mapping[str, int]) -> bool:
    """Return whether the classes of a model have only the default names of transformers."""
    return all(_DEFAULT.fullmatch(name) for name in known)


def _refuse_new_labels(labels: Mapping[str, list[Label]]) -> None:
    """Check that all labels are in the training data. Others are typing errors, or unknown to the candidates."""
    trained = {str(label) for label in labels.get("train", [])}
    for split, column in labels.items():
        new = sorted({str(label) for label in column} - trained)
        if trained and new:
            raise ConfigError(
                f"task.{split}: has the labels {quoted(new)}, which are not in the training data"
                f"{nearest(new[0], trained) or '.'} Use the same labels in all files."
            )
