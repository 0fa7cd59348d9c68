"""FLOPs of a model that computes sparsely: those of the dense one, also where a real step is watched."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from lightning_rigl import FLOPsCallback, RigLCallback, export
from lightning_rigl.compute import crossover
from lightning_rigl.kernels import library
from tests.callbacks.flops_modules import AsksTheTrainer, Hooked, Item, OwnLoop
from tests.callbacks.flops_problems import F_D, GAN, Attends, Manual, Silent, batches, fit, measurements, rigl
from tests.callbacks.test_flops_budget import spent

pytestmark = pytest.mark.filterwarnings("ignore:RigLCallback. (training has|no topology update)")


@pytest.fixture(params=["torch", "native"])
def compute(request, monkeypatch):
    if request.param == "native" and library.load() is None:
        pytest.skip(f"no native kernels here: {library.why_not()}")
    monkeypatch.setattr(crossover, "least_rows", lambda size, connections, rule: 1)
    return request.param


class Reads(Silent):
    """Its loss is looked at: no copy without values can run it."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        assert loss.item() > 0
        return loss


class Accumulates(Manual):
    """One step of the optimizer for two passes."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for half in (slice(0, 2), slice(2, None)):
            self.manual_backward(cross_entropy(self(batch[0][half]), batch[1][half]))
        optimizer.step()
        optimizer.zero_grad()


class Deep(Reads):
    """A sequence, a layer that is used twice, a tied weight, attention, a layer that is left out."""

    def __init__(self):
        super().__init__()
        self.twice, self.tied, self.bare = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 4, bias=False)
        self.tied.weight = self.twice.weight
        self.attention, self.idle = Attends().attention, nn.Linear(8, 8)

    def forward(self, x):
        memory = torch.stack([x, x + 1, x - 1], 1)
        hidden = self.net[:2](self.attention(x[:, None], memory, memory)[0])
        hidden = self.tied(self.twice(self.twice(hidden)))
        return (self.net[2](hidden) + self.bare(hidden))[:, 0]


class Repeats(Reads):
    reentrant = False

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant else x
        return self.net[2](checkpoint(self.net[:2], x, use_reentrant=self.reentrant))


class RepeatsAll(Repeats):
    reentrant = True


class Teacher(Reads):
    """A pass without gradients, of layers that are trained."""

    def forward(self, x):
        with torch.no_grad():
            shift = self.net(x)
        return self.net(x) - shift / 2


class Critics(GAN):
    """Samples of a generator that is frozen meanwhile, made with gradients disabled."""

    def training_step(self, batch, batch_idx):
        critic = self.optimizers()[1]
        self.toggle_optimizer(critic)
        with torch.no_grad():
            made = self.generator(batch[0])
        self.manual_backward(self.critic(made).square().mean())
        critic.step()
        self.untoggle_optimizer(critic)
        super().training_step(batch, batch_idx)


class Penalty(Reads):
    """A gradient of a gradient."""

    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        [slope] = torch.autograd.grad(self(x).square().sum(), x, create_graph=True)
        return super().training_step(batch, batch_idx) + slope.square().mean()


class Makes(Reads):
    """A weight is scaled by what a layer makes of constants."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 8))
        self.maker, self.base = nn.Linear(8, 16, bias=False), nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        return self.net(x) + linear(x, self.base * self.maker(self.codes))


class Validates(Reads):
    """Its validation is watched, too, and is another computation."""

    def validation_step(self, batch, batch_idx):
        assert self.net[2](self.net[0](batch[0])).sum().item() != 0


class Look(pl.Callback):
    """Which modules computed sparsely in the last batch."""

    def on_train_batch_end(self, trainer, module, *_):
        self.sparse = [m for m in module.modules() if "_lightning_rigl_product" in vars(m)]


def counted(way, module, order=1, **settings):
    """All that is told of a fit, and the modules that computed sparsely in its last batch."""

    torch.manual_seed(0)
    flops, sparse, look = FLOPsCallback(), rigl(compute=way), Look()
    fit(*(flops, sparse)[::order], look, module=module(), **settings)
    report = flops.report()
    return (report, str(report), flops.state_dict()["table"]), look.sparse


KINDS = [Reads, Manual, Accumulates, AsksTheTrainer, Hooked, OwnLoop, Item, Deep]
KINDS += [Repeats, RepeatsAll, Teacher, Critics, Makes]


@pytest.mark.parametrize("module", KINDS)
@pytest.mark.filterwarnings("ignore:.*(no product with idle.weight was|of the same form|Online softmax)")
def test_a_real_step_is_counted_as_if_it_were_dense(module, compute, recwarn):
    sizes = (8, 8, 4) if module is OwnLoop else (8, 8, 4, 8, 4, 6)
    expected, dense = counted("dense", module, sizes=sizes, max_epochs=2)
    told, sparse = counted(compute, module, sizes=sizes, max_epochs=2)
    assert told == expected
    assert sparse
    assert not dense
    said = [str(w.message) for w in recwarn if "no product" in str(w.message)]
    assert all("with idle.weight was" in words for words in said)


class RepeatsLast(Reads):
    """What is repeated ends in a linear layer: a dense one is spared, as it saves nothing of its own."""

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize("module", [Penalty, RepeatsLast])
def test_what_a_sparse_layer_really_runs_more_is_counted_and_all_else_the_same(module, compute):
    (expected, *_), _ = counted("dense", module)
    (told, *_), _ = counted(compute, module)
    assert (told.layers, told.other, told.train) == (expected.layers, expected.other, expected.train)
    more = F_D if module is Penalty else told.layers[1].forward  # the weights' gradients, of zeros too
    assert told.train_actual - expected.train_actual == 20 * more


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("module", [Reads, Accumulates])
def test_in_either_order_and_with_accumulation(module, order, compute):
    many = {} if module is Accumulates else {"accumulate_grad_batches": 2}
    settings = {"sizes": [8] * 20, "order": order, **many}
    assert counted(compute, module, **settings)[0] == counted("dense", module, **settings)[0]


@pytest.mark.parametrize("mode", [True, False])
def test_a_validation_that_is_watched(mode, compute):
    def told(way):
        flops, loader = FLOPsCallback(), batches(8, 8)
        run = fit(flops, rigl(every=1, compute=way), module=Validates(), loader=loader, inference_mode=mode)
        run.fit_loop.max_epochs = 2
        run.fit(Validates(), loader, loader)
        return flops._meter.inference, str(flops.report())

    assert told(compute) == told("dense")
    assert told(compute)[0].layers


def test_watching_changes_nothing_of_a_sparse_fit(compute):
    def trained(*callbacks):
        torch.manual_seed(0)
        module = Accumulates()
        fit(rigl(compute=compute), *callbacks, module=module, sizes=[8] * 20)
        return [p.detach() for p in module.parameters()]

    for a, b in zip(trained(), trained(FLOPsCallback()), strict=True):
        assert torch.equal(a, b)


def test_a_budget_ends_at_the_same_step(compute):
    def told(way):
        torch.manual_seed(0)
        return spent("0.3x", rigl(compute=way), module=Reads(), sizes=[8] * 12)

    assert told(compute) == told("dense")
    assert 0 < len(told(compute)) < 36


def test_layers_large_enough_to_gain():
    class Large(Reads):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())

    def told(way):
        torch.manual_seed(0)
        flops, sparse = FLOPsCallback(), RigLCallback(0.9, seed=1, compute=way)
        fit(flops, sparse, module=Large(), sizes=[256])
        return str(flops.report()), "dense" not in sparse.sparsifier.compute.cells["net.2.weight"]

    text, computed = told("auto")
    assert computed
    assert (text, False) == told("dense")


class TestExported:
    """A part that comes from `lightning_rigl.export.sparse` has no parameter: what it has left is counted."""

    class Tuned(Silent):
        """A new head on a body that is done; ``prompt`` is trained before it."""

        def __init__(self, backend, prompted):
            super().__init__()
            body = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
            self.kept = [m.weight for m in body[::2]]
            with torch.no_grad():
                for weight in self.kept:
                    weight.mul_(torch.rand_like(weight) < 0.25)
            self.net = nn.Sequential(export.sparse(body, backend, min_sparsity=0.0), nn.Linear(4, 4))
            self.prompt = nn.Parameter(torch.zeros(16)) if prompted else torch.zeros(16)

        def forward(self, x):
            return self.net(x + self.prompt.to(x.device))

    class TunedByHand(Tuned, Manual):
        pass

    @pytest.mark.parametrize("prompted", [False, True])
    @pytest.mark.parametrize("base", [Tuned, TunedByHand])
    def test_a_linear_layer_costs_its_connections(self, base, prompted, compute, monkeypatch):
        made, flops, module = measurements(monkeypatch), FLOPsCallback(), base(compute, prompted)
        fit(flops, module=module, sizes=[8])
        kept, report = sum(int(w.count_nonzero()) for w in module.kept), flops.report()
        assert made == [base is self.Tuned]
        assert (report.other, report.forward) == (2 * kept, 2 * (kept + 16))
        assert report.train_actual == 8 * 2 * (kept * (1 + prompted) + 16 * (2 + prompted))

    def test_a_convolution_of_one_pixel_costs_them_at_each_pixel(self, compute):
        class Images(Silent):
            def __init__(self):
                super().__init__()
                layer = nn.Conv2d(16, 6, 1)
                with torch.no_grad():
                    layer.weight[:, 4:] = 0
                self.body, self.net = export.sparse(layer, compute, min_sparsity=0.0), nn.Linear(6, 4)

            def forward(self, x):
                return self.net(self.body(x[..., None, None].expand(-1, -1, 3, 5)).mean((2, 3)))

        flops = FLOPsCallback()
        fit(flops, module=Images(), sizes=[8])
        assert flops.report().other == 2 * 24 * 15
        assert flops.report().forward_dense == 2 * (24 * 15 + 24)


def test_the_dense_counts_are_those_of_the_model():
    told, _ = counted("dense", Reads)
    assert told[0].forward_dense == F_D
