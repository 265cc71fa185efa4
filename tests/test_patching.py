"""Activations are rewritten where and when asked, and nothing stays behind."""

import pytest
import torch
from torch import nn

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
        with rewriting(copies(0, {1: [(first, None)], 3: [(second, None)]})):
            h = first(x)
            y = second(h)
    assert torch.equal(h[1], first(x)[0]) and torch.equal(y[3], plain[0])
    assert torch.equal(y[1], y[0])  # all that follows the copy follows it
    assert torch.equal(y[[0, 2]], plain[[0, 2]]) and not torch.equal(y[1], plain[1])


def test_single_tokens_are_copied_row_by_row(x):
    module = nn.Identity()
    with rewriting(copies(2, {0: [(module, 1), (module, 4)], 3: [(module, 0)]})):
        y = module(x)
    wanted = x.clone()
    wanted[0, 1], wanted[0, 4], wanted[3, 0] = x[2, 1], x[2, 4], x[2, 0]
    assert torch.equal(y, wanted)


def test_the_modules_own_input_is_not_written_to(x):
    module, before = nn.Identity(), x.clone()
    with rewriting(copies(0, {1: [(module, None)]})):
        module(x)
    with rewriting({module: added(torch.ones(4, 1, 3), 2)}):
        module(x)
    assert torch.equal(x, before)


def test_of_a_tuple_the_first_entry_is_rewritten(x):
    module = Doubled()
    with rewriting(copies(0, {1: [(module, None)]})):
        y, weights = module(x)
    assert torch.equal(y[1], 2 * x[0]) and weights == "weights"


def test_only_the_named_calls_are_rewritten(x):
    inner = nn.Identity()
    network = nn.Sequential(inner)
    with rewriting(copies(0, {1: [(inner, None)]}), network, calls=[1, 3]):
        copied = [bool((network(x)[1] == x[0]).all()) for _ in range(5)]
    assert copied == [False, True, False, True, False]


def test_noise_is_added_to_the_tokens_from_the_first_on(x):
    module, noise = nn.Identity(), torch.randn(4, 2, 3)
    with rewriting({module: added(noise, 2)}):
        y = module(x)
    assert torch.allclose(y[:, 2:4] - x[:, 2:4], noise, atol=1e-6)
    assert torch.equal(y[:, [0, 1, 4]], x[:, [0, 1, 4]])
    with pytest.raises(ValueError, match="noise of 3 rows meets a batch of 4"):
        added(noise[:3], 2)(x)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_hooks_go_and_others_stay(x, error):
    network, calls = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), []
    network[0].register_forward_hook(lambda *args: calls.append(1))
    before = hooks(network)
    try:
        with rewriting(copies(0, {1: [(network[1], None)]}), network):
            network(x)
            if error is not None:
                raise error("in the middle")
    except BaseException as caught:
        assert type(caught) is error
    assert hooks(network) == before and calls == [1]


def test_a_module_that_did_not_run_is_reported(x):
    ran, idle = nn.Identity(), nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"1 of 2 modules to patch \(Linear\) did not run"):
        with rewriting(copies(0, {1: [(ran, None), (idle, None)]})):
            ran(x)
    assert hooks(idle) == [[], []]


def test_a_compiled_network_is_refused(x):
    network = nn.Sequential(nn.Linear(3, 3))
    network[0].compile()
    with pytest.raises(ValueError, match="compiled"):
        with rewriting(copies(0, {1: [(network[0], None)]}), network):
            network(x)
    assert hooks(network) == [[], []] * 2
