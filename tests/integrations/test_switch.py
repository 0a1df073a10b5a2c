"""integrations._switch: all of a peer's attributes are replaced or none, and its own come back."""

from __future__ import annotations

import functools
import sys
import types
import warnings

import pytest

from osf_torch.integrations import _peer
from osf_torch.integrations._switch import Replacement, Switch


def ours(x, rank=4, *, seed=0):
    return "ours"


def our_method(self, x):
    return "ours"


@pytest.fixture
def peer(monkeypatch):
    """A package of two modules, the second with a copy of what the first defines."""
    module, other = types.ModuleType("osf_peer"), types.ModuleType("osf_peer.other")

    def scale(x, rank=4):
        return "theirs"

    class Base:
        def inherited(self, x):
            return "theirs"

    class Layer(Base):
        def forward(self, x):
            return "theirs"

    module.scale = other.scale = scale
    module.Layer, module.Base = Layer, Base
    monkeypatch.setitem(sys.modules, "osf_peer", module)
    monkeypatch.setitem(sys.modules, "osf_peer.other", other)
    monkeypatch.setattr(_peer.importlib.metadata, "version", lambda _: "1.2")
    return module


def replacements(peer):
    return [
        Replacement(peer, "scale", ours),
        Replacement(peer.Layer, "forward", our_method),
        Replacement(peer.Layer, "inherited", our_method),
    ]


def state(peer):
    return dict(vars(peer)), dict(vars(peer.Layer)), dict(vars(peer.Base))


@pytest.fixture
def switch():
    return Switch("osf-peer", ">=1,<2", "some")


def test_there_and_back(peer, switch):
    before = state(peer)
    for _ in range(2):
        switch.on(replacements(peer))
        switch.on(replacements(peer))
        assert switch
        assert peer.scale is ours
        assert (peer.Layer().forward(0), peer.Layer().inherited(0)) == ("ours", "ours")
        assert peer.Base().inherited(0) == "theirs"
        assert switch.own(peer, "scale")(0) == "theirs"
        switch.off()
        switch.off()
        assert not switch
        assert state(peer) == before
    assert switch.own(peer, "scale") is peer.scale


def without(x):
    """Of fewer arguments."""


def renamed(y, rank=4):
    """Of another name."""


def other_default(x, rank=8):
    """Of another default."""


def with_more(x, rank=4, more=None):
    """Of more arguments."""


def keyword_only(x, *, rank=4):
    """Of another kind."""


@pytest.mark.parametrize(
    "theirs", [None, without, renamed, other_default, with_more, keyword_only, 42, max]
)
@pytest.mark.parametrize("last", [True, False])
def test_what_does_not_fit_leaves_everything(peer, switch, theirs, last):
    wanted = replacements(peer)
    if last:
        wanted.reverse()
    peer.scale = theirs
    if theirs is None:
        del peer.scale
    before = state(peer)
    for _ in range(2):
        with pytest.raises(ImportError) as caught:
            switch.on(wanted)
        assert state(peer) == before
        assert not switch
        text = str(caught.value)
        assert text.startswith(
            "osf_torch.integrations.some.enable: expected osf_peer.scale to take"
        )
        assert "(x, rank=4, *, seed=0), as it does in osf-peer >=1,<2, got " in text
        assert f"got {'none in' if theirs is None else ''}" in text
        assert "1.2" in text
        assert caught.value.name == "osf_peer.scale"


def test_a_wrapper_of_the_peers_own_passes_and_comes_back(peer, switch):
    own = peer.scale
    bare = peer.scale = lambda *args, **kwargs: own(*args, **kwargs)
    switch.on(replacements(peer))
    switch.off()
    assert peer.scale is bare
    peer.scale = functools.wraps(own)(bare)
    switch.on(replacements(peer))
    assert peer.scale is ours
    switch.off()
    assert peer.scale is bare


def test_what_another_put_on_top_is_left_and_said(peer, switch):
    before = state(peer)
    switch.on(replacements(peer))

    def theirs(self, x):
        return "another's"

    peer.Layer.forward = theirs
    with pytest.warns(
        RuntimeWarning,
        match=r"some\.enable: .*theirs \(.*test_switch.py:\d+\) as .*Layer\.forward, put",
    ):
        switch.on(replacements(peer))
    assert peer.Layer.forward is theirs
    with pytest.warns(RuntimeWarning, match=r"some\.disable: .*call disable\(\) again"):
        switch.off()
    assert peer.Layer.forward is theirs
    assert (peer.scale(0), peer.Layer().inherited(0)) == ("theirs", "theirs")
    with pytest.warns(RuntimeWarning, match=r"some\.enable"):  # the others are ours again
        switch.on(replacements(peer))
    assert peer.scale is ours
    peer.Layer.forward = our_method  # theirs is off, what it found is back
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switch.on(replacements(peer))
        switch.off()
    assert state(peer) == before


def test_what_was_taken_away_is_said_too(peer, switch):
    switch.on(replacements(peer))
    del peer.scale
    with pytest.warns(RuntimeWarning, match=r"got nothing as osf_peer\.scale"):
        switch.off()


def test_a_module_that_imported_ours_meanwhile_has_its_own_back(peer, switch, monkeypatch):
    own = peer.scale
    switch.on(replacements(peer))
    late, stranger = types.ModuleType("osf_peer.late"), types.ModuleType("osf_peers")
    late.scale = stranger.scale = peer.scale
    monkeypatch.setitem(sys.modules, "osf_peer.late", late)
    monkeypatch.setitem(sys.modules, "osf_peers", stranger)
    switch.off()
    assert late.scale is own
    assert stranger.scale is ours, "of another package"
