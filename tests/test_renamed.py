"""Old names keep working for one version."""

import importlib
import pkgutil

import pytest

from lm._renamed import NEW_ATTRIBUTES, NEW_NAMES


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


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [(module, old, new) for module, names in NEW_ATTRIBUTES.items() for old, new in names.items()],
)
def test_an_old_name_in_a_module_gives_the_same_object_and_a_warning(module: str, old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=" is now ") as warnings:
        found = getattr(importlib.import_module(module), old)
    assert str(warnings[-1].message) == f"{module}.{old} is now {new}; the old name goes in 0.3."
    assert found is pkgutil.resolve_name(new)


def test_functions_that_are_gone_work_for_one_version() -> None:
    from lm.config import compose, preset_summary
    from lm.jobs.train import counts_alone

    with pytest.warns(DeprecationWarning, match="read the preset's file"):
        assert preset_summary("ngram-char").startswith("Counts of characters")
    with pytest.warns(DeprecationWarning, match="in_one_pass"):
        assert counts_alone(compose("input.txt", preset="ngram-char"))
