"""Old module names keep working for one version."""

import importlib

import pytest

from lm._renamed import NEW_NAMES


@pytest.mark.parametrize(("old", "new"), NEW_NAMES.items())
def test_an_old_module_name_gives_the_same_objects_and_a_warning(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        # Imported anew each time, whatever another test imported before.
        module = importlib.util.module_from_spec(importlib.util.find_spec(old))  # type: ignore[arg-type]
    objects = {}
    for part in new.split(" and "):
        objects.update(vars(importlib.import_module(part)))
    for name, value in objects.items():
        assert name.startswith("__") or vars(module)[name] is value
