"""A wrapped checkpoint behaves like the inner one, except for what a subclass overrides."""

from dataclasses import fields
from unittest.mock import create_autospec

from quantize8.sources.base import Checkpoint
from quantize8.sources.wrapper import Wrapper


def test_all_that_a_checkpoint_offers_is_handed_on_but_blocks():
    facts = {field.name for field in fields(Checkpoint)}
    offered = {name for name in vars(Checkpoint) if not name.startswith("_")} - facts
    assert offered - vars(Wrapper).keys() == {"blocks"}
    inner = create_autospec(Checkpoint, instance=True, folder="folder", identity={}, files={"a": 1})
    inner.decoded, inner.is_remote, inner.one_reader_a_file = frozenset({"b"}), True, True
    inner.name = "model"  # which a mock's constructor takes for its own
    wrapper = Wrapper(inner, {})
    for name in facts - {"tensors"}:
        assert getattr(wrapper, name) is getattr(inner, name), name
    for name in offered - {"blocks"}:
        if isinstance(vars(Wrapper)[name], property):
            assert getattr(wrapper, name) is getattr(inner, name), name
            continue
        arguments = {
            "int8_rows": ("t", 1, 2),
            "rows": ("t", 1, 2),
            "fingerprint": (),
            "left_behind": (),
            "require_companions": (),
        }.get(name, ("t",))
        result = getattr(wrapper, name)(*arguments)
        assert result is getattr(inner, name).return_value or name in (
            "confirm",
            "write_companions",
            "require_companions",
        ), name
        getattr(inner, name).assert_called_once_with(*arguments)
