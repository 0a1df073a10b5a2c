"""Threads that read a confined model while another one trains it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from osf_kernels import free_matrix
from osf_torch import confine
from tests.small_confine import adamw, batches, drawn, filled, loss_of, relative


def layers(width):
    model = filled(nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 6)), "threads")
    subspaces = {
        f"{i}.weight": drawn(*model[i].weight.shape, 0.5, "UV", "high", "threads") for i in (0, 2)
    }
    return model, confine(model, subspaces)


def together(count, run):
    """What each of some threads returns, which all begin at the same time."""
    barrier, found = threading.Barrier(count), []

    def one():
        barrier.wait()
        found.append(run())

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("reads", ["state_dict", "forward", "weight"])
def test_training_goes_on_as_it_does_alone(reads):
    """Readers that find a step half done bring weights up to date with it: each of them what it
    has read, and one at a time."""
    runs = []
    for is_read in (False, True):
        model, confined = layers(64)
        optimizer, done = adamw(model.parameters()), threading.Event()

        def watch(model=model, done=done):
            with torch.no_grad():
                while not done.is_set():
                    if reads == "state_dict":
                        model.state_dict()
                    elif reads == "forward":
                        model(torch.ones(2, 20))
                    else:
                        _ = model[0].weight, model[2].weight

        readers = [threading.Thread(target=watch) for _ in range(2 * is_read)]
        for reader in readers:
            reader.start()
        for x in batches(100, "threads"):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
        done.set()
        for reader in readers:
            reader.join()
        assert max(confined.drift().values()) < 3e-6
        runs.append({name: t.clone() for name, t in model.state_dict().items()})
    for name, t in runs[0].items():
        assert relative(runs[1][name], t) < 1e-4, name


@pytest.mark.parametrize("attempt", range(3))
def test_whoever_comes_first_merges_and_the_others_wait(attempt):
    model, confined = layers(600)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for place in confined.places:
            place.get(place.spec.free).normal_(std=0.1)
        for layer, place in zip((plain[0], plain[2]), confined.places, strict=True):
            C = place.get(place.spec.free)
            update = free_matrix(C, place.spec.left, place.spec.right)
            layer._parameters["weight"] += update
            layer.weight_free.copy_(C)
            layer.weight_merged.copy_(C)
    (x,) = batches(1, "first")

    def run():
        with torch.no_grad():
            return model(x)

    wanted = plain(x)
    assert all(relative(y, wanted) < 1e-6 for y in together(4, run))
