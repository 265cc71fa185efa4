"""Activations are rewritten where and when asked, and nothing stays behind."""

import copy

import pytest
import torch
from torch import nn

from loco_core.interventions.active import closed, foreign_hooks, opened, ours, reopened, said
from loco_core.interventions.patching import added, copies, rewriting


class Doubled(nn.Module):
    """Returns a tuple, as the attention of transformers does."""

    def forward(self, x):
        return 2 * x, "weights"


@pytest.fixture
def x():
    return torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))


def hooks(module):
    return [
        list(kind.items())
        for part in module.modules()
        for kind in (part._forward_hooks, part._forward_pre_hooks)
    ]


def test_each_row_gets_the_source_rows_output_at_its_own_modules(x):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    with torch.no_grad():
        plain = second(first(x))
        with rewriting(copies({1: [(0, first, None)], 3: [(0, second, None)]})):
            h = first(x)
            y = second(h)
    assert torch.equal(h[1], first(x)[0]) and torch.equal(y[3], plain[0])
    assert torch.equal(y[1], y[0])  # all that follows the copy follows it
    assert torch.equal(y[[0, 2]], plain[[0, 2]]) and not torch.equal(y[1], plain[1])


def test_single_tokens_are_copied_row_by_row(x):
    module = nn.Identity()
    with rewriting(copies({0: [(2, module, 1), (2, module, 4)], 3: [(1, module, 0)]})):
        y = module(x)
    wanted = x.clone()
    wanted[0, 1], wanted[0, 4], wanted[3, 0] = x[2, 1], x[2, 4], x[1, 0]
    assert torch.equal(y, wanted)


def test_the_modules_own_input_is_not_written_to(x):
    module, before = nn.Identity(), x.clone()
    with rewriting(copies({1: [(0, module, None)]})):
        module(x)
    with rewriting({module: added({row: (2, torch.ones(1, 3)) for row in range(4)}, 4)}):
        module(x)
    assert torch.equal(x, before)


def test_of_a_tuple_the_first_entry_is_rewritten(x):
    module = Doubled()
    with rewriting(copies({1: [(0, module, None)]})):
        y, weights = module(x)
    assert torch.equal(y[1], 2 * x[0]) and weights == "weights"


def test_only_the_named_calls_are_rewritten(x):
    inner = nn.Identity()
    network = nn.Sequential(inner)
    with rewriting(copies({1: [(0, inner, None)]}), network, calls=[1, 3]):
        copied = [bool((network(x)[1] == x[0]).all()) for _ in range(5)]
    assert copied == [False, True, False, True, False]


def test_noise_is_added_to_the_tokens_of_its_row_from_its_first_on(x):
    module, one, two = nn.Identity(), torch.randn(2, 3), torch.randn(1, 3)
    with rewriting({module: added({1: (2, one), 3: (0, two)}, 4)}):
        y = module(x)
    wanted = x.clone()
    wanted[1, 2:4] += one
    wanted[3, 0] += two[0]
    assert torch.equal(y, wanted)
    with pytest.raises(ValueError, match="noise of 3 rows meets a batch of 4"):
        added({1: (2, one)}, 3)(x)


def test_a_source_row_that_is_itself_patched_gives_its_own_activation(x):
    module = nn.Identity()
    with rewriting(copies({1: [(0, module, None)], 2: [(1, module, None)]})):
        y = module(x)
    assert torch.equal(y[1], x[0]) and torch.equal(y[2], x[1])


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_hooks_go_and_others_stay(x, error):
    network, calls = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), []
    network[0].register_forward_hook(lambda *args: calls.append(1))
    before = hooks(network)
    try:
        with rewriting(copies({1: [(0, network[1], None)]}), network):
            network(x)
            if error is not None:
                raise error("in the middle")
    except BaseException as caught:
        assert type(caught) is error
    assert hooks(network) == before and calls == [1]


def test_a_module_that_did_not_run_is_reported(x):
    ran, idle = nn.Identity(), nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"1 of 2 modules to patch \(Linear\) did not run"):
        with rewriting(copies({1: [(0, ran, None), (0, idle, None)]})):
            ran(x)
    assert hooks(idle) == [[], []]


def test_a_compiled_network_is_refused(x):
    network = nn.Sequential(nn.Linear(3, 3))
    network[0].compile()
    with pytest.raises(ValueError, match="compiled"):
        with rewriting(copies({1: [(0, network[0], None)]}), network):
            network(x)
    assert hooks(network) == [[], []] * 2


# --- what is hooked on now


def test_hooks_of_ours_say_what_they_do_while_they_are_on(x):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    twice = {"times": 2}
    with rewriting({network[1]: lambda y: 2 * y}, network, says=twice):
        network(x)
        assert said(network) == [["1", twice]]  # the counter of calls changes nothing, and is mute
        assert foreign_hooks(network) == []
        with rewriting({network[0]: lambda y: y}, says=lambda: "told when asked"):
            network(x)
            assert said(network) == [["0", "told when asked"], ["1", twice]]
    assert said(network) == []


def test_a_copy_of_a_network_still_says_what_its_hooks_do(x):
    network = nn.Sequential(nn.Linear(3, 3))
    handle = network[0].register_forward_pre_hook(ours(lambda module, args: None, ["held", 3]))
    assert said(copy.deepcopy(network)) == said(network) == [["0", ["held", 3]]]
    handle.remove()


def test_a_hook_of_somebody_else_is_named(x):
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Identity()))
    assert foreign_hooks(network) == []
    handles = [
        network[1][0].register_forward_hook(lambda *args: None),
        network[0].register_forward_pre_hook(lambda *args: None),
    ]
    assert foreign_hooks(network) == ["0", "1.0"] and said(network) == []
    for handle in handles:
        handle.remove()
    network[1].forward = lambda x: x
    assert foreign_hooks(network) == ["1"]
    del network[1].forward
    everywhere = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert foreign_hooks(network) == ["every module (a global hook)"]
    finally:
        everywhere.remove()
    assert foreign_hooks(network) == []


def test_rewrites_that_do_not_say_what_they_do_are_foreign(x):
    network = nn.Sequential(nn.Linear(3, 3))
    with rewriting({network[0]: lambda y: 2 * y}):
        network(x)
        assert foreign_hooks(network) == ["0"] and said(network) == []


class Pipe:
    """Anything that can be referred to weakly."""


def test_open_contexts_are_listed_until_they_are_closed():
    pipe, one, two = Pipe(), min, max
    for context in (one, two, one):
        opened(pipe, context)
    assert reopened(pipe) == (one, two, one) and reopened(Pipe()) == ()
    closed(pipe, one)  # of equal ones the newest
    assert reopened(pipe) == (one, two)
    for context in (two, one):
        closed(pipe, context)
    closed(pipe, one)  # what is not open is closed already
    assert reopened(pipe) == ()
