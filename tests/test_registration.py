"""Hooks fire in either order of imports, and a broken one never breaks the user's own import."""

import sys
import warnings
from importlib import import_module

import pytest

from hfnoise import registration
from hfnoise.registration import HOOKS, Hook, install_hooks, raise_if_failed


@pytest.fixture
def make_module(tmp_path, monkeypatch):
    """Return a function that writes an importable module; all of them are forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "_failures", {})
    written = []

    def make(name, code=""):
        (tmp_path / f"{name}.py").write_text(code)
        written.append(name)

    yield make
    for name in written:
        sys.modules.pop(name, None)


def test_hook_fires_when_its_trigger_is_imported_later(make_module):
    make_module("trigger_later")
    make_module("target_later")
    install_hooks((Hook("trigger_later", "target_later"),))
    assert "target_later" not in sys.modules
    import_module("trigger_later")
    assert "target_later" in sys.modules


def test_hook_fires_at_once_when_its_trigger_is_there(make_module):
    make_module("trigger_before")
    make_module("target_before")
    import_module("trigger_before")
    install_hooks((Hook("trigger_before", "target_before"),))
    assert "target_before" in sys.modules


def test_target_sees_the_trigger_complete(make_module):
    make_module("trigger_complete", "registry = {}")
    make_module("target_complete", "import trigger_complete\ntrigger_complete.registry['ours'] = True")
    install_hooks((Hook("trigger_complete", "target_complete"),))
    assert import_module("trigger_complete").registry == {"ours": True}


def test_broken_target_warns_once_and_raises_at_first_use(make_module):
    make_module("trigger_broken", "value = 1")
    make_module("target_broken", "raise RuntimeError('the registry has moved')")
    install_hooks((Hook("trigger_broken", "target_broken"),))
    with pytest.warns(UserWarning, match="could not register target_broken in trigger_broken: the registry has moved"):
        assert import_module("trigger_broken").value == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert import_module("trigger_broken").value == 1
    with pytest.raises(ImportError, match="target_broken could not be registered: the registry") as raised:
        raise_if_failed("target_broken")
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_nothing_is_raised_for_a_target_that_works(make_module):
    make_module("trigger_fine")
    make_module("target_fine")
    install_hooks((Hook("trigger_fine", "target_fine"),))
    import_module("trigger_fine")
    raise_if_failed("target_fine")


def test_our_hooks_register():
    for hook in HOOKS:
        import_module(hook.trigger)
        import_module(hook.target)
        raise_if_failed(hook.target)
