"""How FLOPsCallback measures: each kind of batch once, on a copy without values or else on the real step."""

from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_rigl import FLOPsCallback
from tests.callbacks.flops_modules import EVERY_KIND, ON_A_COPY, ON_A_REAL_STEP, ByHand, Item, OwnLoop
from tests.callbacks.flops_problems import F_D, Attends, Manual, Silent, batches, fit, measurements, rigl
from tests.callbacks.problems import Small, trainer

pytestmark = pytest.mark.filterwarnings("ignore:RigLCallback. (training has|no topology update)")


@pytest.mark.parametrize("model", EVERY_KIND)
def test_the_model_is_measured_once_on_a_copy_or_else_on_the_real_step(model, monkeypatch):
    made, counter = measurements(monkeypatch), FLOPsCallback()
    fit(counter, module=model(), max_epochs=2)
    once = [True] if model in ON_A_COPY else [False] if model in ON_A_REAL_STEP else [True, False]
    sizes = 1 if model is OwnLoop else 2  # it draws its own batches
    assert made == ([False] * 6 if model is ByHand else once * sizes)
    report = counter.report()
    assert (report.train, report.unknown, report.other) == (40 * 3 * F_D, (), 0)
    assert report.train_actual == 40 * 2 * (2 * 384 + 3 * 96)


@pytest.mark.parametrize("base", [Item, ByHand])
def test_the_products_of_an_optimizer_are_not_counted(base):
    class WithMuon(base):
        def configure_optimizers(self):
            return torch.optim.Muon([p for p in self.parameters() if p.dim() == 2], 0.01)

    counter = FLOPsCallback()
    fit(counter, module=WithMuon())
    assert (counter.report().other, counter.report().train) == (0, 20 * 3 * F_D)
    assert counter.report().train_actual == 20 * 2 * (2 * 384 + 3 * 96)


class Checkpointed(Silent):
    reentrant = False

    def forward(self, x):
        x = x.requires_grad_() if self.reentrant else x
        return self.net[2](checkpoint(self.net[:2], x, use_reentrant=self.reentrant))


class CheckpointedByHand(Checkpointed, Manual):
    pass


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("base", [Checkpointed, CheckpointedByHand])
def test_what_activation_checkpointing_repeats_is_in_train_actual(base, reentrant, monkeypatch):
    made, counter, module = measurements(monkeypatch), FLOPsCallback(), base()
    module.reentrant = reentrant
    fit(counter, module=module)
    assert made == ([True] * 2 if base is Checkpointed else [False] * 3)
    assert counter.report().train == 20 * 3 * F_D
    # twice the first layer, and its input's gradient where the input asks for one
    assert counter.report().train_actual == 20 * 2 * ((3 + reentrant) * 384 + 3 * 96)


class Sequences(Silent):
    """Attention over a sequence: its scores grow with the square of the length."""

    def __init__(self):
        super().__init__()
        self.net = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()


class Images(Silent):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()


def encoder(length):
    return 2 * (length * (3 * 16 * 16 + 16 * 16 + 2 * 16 * 24) + 2 * length * length * 16)


def convolution(size):
    return 2 * (4 * 3 * 9 * (size - 2) ** 2 + 8)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(
    ("model", "shape", "cost"),
    [(Sequences, lambda n: (n, 16), encoder), (Images, lambda n: (3, n, n), convolution)],
)
def test_each_shape_of_a_batch_is_measured_on_first_sight(model, shape, cost, real, monkeypatch):
    class Real(model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (loss.item() > 0)

    made, counter = measurements(monkeypatch), FLOPsCallback()
    kinds = [(8, 5), (8, 9), (8, 5), (3, 9), (8, 6), (1, 5)]  # samples, length
    loader = DataLoader([torch.randn(samples, *shape(n)) for samples, n in kinds], batch_size=None)
    fit(counter, module=Real() if real else model(), loader=loader, max_epochs=2)
    assert made == ([True, False] * 5 if real else [True] * 5)
    assert counter.report().train == 2 * sum(3 * samples * cost(n) for samples, n in kinds)


class Contrasts(Silent):
    """Every sample is compared with every other, and a merge of two factors costs the same for any batch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 6, bias=False)
        self.up, self.down = (nn.Parameter(torch.ones(shape)) for shape in ((6, 2), (2, 16)))

    def training_step(self, batch, batch_idx):
        codes = linear(batch[0], self.net.weight + self.up @ self.down)
        return (codes @ codes.t()).square().mean()


def test_costs_that_are_not_in_proportion_to_the_samples_are_exact():
    counter, sizes = FLOPsCallback(), (8, 5, 5, 7, 8)
    fit(counter, module=Contrasts(), sizes=sizes, max_epochs=2)
    products = [n * 96 + 6 * 2 * 16 + n * n * 6 for n in sizes]
    assert counter.report().train == 2 * sum(3 * 2 * each for each in products)
    assert counter.report().train_actual == 2 * sum(
        2 * (3 * each - n * 96) for n, each in zip(sizes, products, strict=True)
    )


class Alternates(Silent):
    """A critic for every batch but each ``rare``-th, at which the generator makes a step, and later both."""

    automatic_optimization = False
    rare, both = 5, 1000

    def __init__(self):
        super().__init__()
        self.net, self.critic = nn.Linear(16, 12, bias=False), nn.Linear(12, 1, bias=False)

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), 0.1) for net in (self.net, self.critic)]

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        if batch_idx % self.rare == self.rare - 1 or batch_idx >= self.both:
            self.manual_backward(self.critic(self.net(batch[0])).mean())
            generator.step()
        if batch_idx % self.rare != self.rare - 1 or batch_idx >= self.both:
            with torch.no_grad():
                made = self.net(batch[0])
            self.manual_backward(self.critic(made).mean())
            critic.step()


def test_batches_whose_optimizers_differ_differ_in_their_costs(recwarn):
    counter = FLOPsCallback()
    fit(counter, module=Alternates(), sizes=[8] * 23, max_epochs=2)
    generator, critic = 3 * (192 + 12), 3 * 12
    assert counter.report().train == 2 * 8 * 2 * (4 * generator + 19 * critic)
    generator, critic = 2 * 192 + 3 * 12, 192 + 2 * 12
    assert counter.report().train_actual == 2 * 8 * 2 * (4 * generator + 19 * critic)
    assert not [w for w in recwarn if "for the first time optimizers" in str(w.message)]


def test_optimizers_that_lightning_does_not_wrap_are_noticed():
    class Raw(Alternates):
        def optimizers(self):
            return super().optimizers(use_pl_optimizer=False)

    counters = FLOPsCallback(), FLOPsCallback()
    for counter, model in zip(counters, (Alternates, Raw), strict=True):
        fit(counter, module=model(), sizes=[8] * 23)
    assert counters[0].report().run == counters[1].report().run
    module = Alternates()
    run = fit(FLOPsCallback(), module=module)
    hooks = (o._optimizer_step_pre_hooks | o._optimizer_step_post_hooks for o in run.optimizers)
    assert not any(hooks)


def test_each_watched_batch_counts_as_it_was_and_a_difference_is_said():
    class Switches(Manual):
        def forward(self, x):
            return self.net(x) + (self.net(x) if self.trainer.global_step else 0)

    counter = FLOPsCallback()
    with pytest.warns(UserWarning, match="batches of the same form, with the same optimizers") as record:
        fit(counter, module=Switches(), sizes=[8] * 20)
    assert sum("of the same form" in str(w.message) for w in record) == 1
    assert counter.report().train == 8 * 3 * F_D * (1 + 19 * 2)


class Bag:
    def __init__(self, x):
        self.x = x


@dataclass
class Data:
    x: torch.Tensor


@pytest.mark.filterwarnings("ignore:.*counts as one sample")
@pytest.mark.parametrize("form", [lambda x: UserDict(x=x), Data, Bag, lambda x: SimpleNamespace(x=x)])
def test_tensors_are_found_in_batches_of_any_form(form):
    class Opens(Sequences):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["x"] if isinstance(batch, UserDict) else batch.x, batch_idx)

    lengths = 4, 9, 4, 16
    counter = FLOPsCallback()
    loader = DataLoader([form(torch.randn(1, n, 16)) for n in lengths], batch_size=None)
    fit(counter, module=Opens(), loader=loader)
    assert counter.report().train == sum(3 * encoder(n) for n in lengths)


def test_packed_sequences_cost_what_their_lengths_cost():
    class Packed(Silent):
        def __init__(self):
            super().__init__()
            self.net = nn.GRU(8, 6, batch_first=True)

        def training_step(self, batch, batch_idx):
            packed = pack_padded_sequence(batch[0], batch[1].cpu(), True, enforce_sorted=False)
            return self.net(packed)[0].data.square().mean()

    lengths = [[9, 2], [9, 9], [9, 5]]
    counter = FLOPsCallback()
    loader = DataLoader([(torch.randn(2, 9, 8), torch.tensor(n)) for n in lengths], batch_size=None)
    fit(counter, module=Packed(), loader=loader, max_epochs=2)
    steps = sum(sum(n) for n in lengths)
    assert counter.report().train == 2 * 3 * steps * 2 * 18 * (8 + 6)


def test_a_step_that_asks_for_its_loss_twice_costs_twice():
    class Twice(Silent):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer_closure()
            optimizer.step(closure=optimizer_closure)

    counter = FLOPsCallback()
    fit(counter, module=Twice())
    assert counter.report().train == 2 * 20 * 3 * F_D


@pytest.mark.parametrize("clock", ["current_epoch", "global_step"])
def test_a_copy_sees_the_time_of_the_batch(clock):
    class Grows(Silent):
        def training_step(self, batch, batch_idx):
            late = getattr(self, clock) > (0 if clock == "current_epoch" else 1)
            loss = super().training_step(batch, batch_idx)
            return loss + super().training_step(batch, batch_idx) if late else loss

    counter = FLOPsCallback()
    loader = batches(8, 8, 5) if clock == "global_step" else batches(8)
    fit(counter, module=Grows(), loader=loader)
    if clock == "current_epoch":  # a new form in the second epoch
        run = fit(counter, module=(module := Grows()), loader=loader)
        assert counter.report().train == 8 * 3 * F_D
        run.fit_loop.max_epochs = 2
        run.fit(module, batches(5))
        assert counter.report().train == (8 + 2 * 5) * 3 * F_D
    else:
        assert counter.report().train == (16 + 2 * 5) * 3 * F_D


def test_an_optimizer_that_joins_later_is_said_and_its_next_step_watched():
    counter, module = FLOPsCallback(), Alternates()
    module.both = 20
    with pytest.warns(UserWarning, match=r"for the first time optimizers \[0, 1\] made the steps") as record:
        fit(counter, module=module, sizes=[8] * 23)
    assert sum("for the first time" in str(w.message) for w in record) == 1
    generator, critic = 3 * (192 + 12), 3 * 12
    booked = [*([critic] * 4 + [generator]) * 4, generator, *[generator + critic] * 2]
    assert counter.report().train == 8 * 2 * sum(booked)


@pytest.mark.parametrize("frozen", [1, 2])
def test_what_is_frozen_in_the_middle_of_an_epoch_has_no_gradient_from_then_on(frozen):
    class Freezes(Silent):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].requires_grad_(batch_idx != frozen)

    counter = FLOPsCallback()
    fit(counter, module=Freezes(), sizes=(8, 8, 8))
    assert counter.report().train_actual == 2 * 8 * 2 * (2 * 384 + 3 * 96) + 8 * 2 * (384 + 2 * 96)


def test_many_kinds_of_batches_are_said(monkeypatch):
    monkeypatch.setattr("lightning_rigl.callbacks.meter.MANY", 3)
    with pytest.warns(UserWarning, match="3 kinds of batches so far"):
        fit(FLOPsCallback(), sizes=(8, 7, 6, 5))


class TestInference:
    class Auxiliary(Small):
        """A second head in training, a dropout that hides nothing, and no head at all in validation."""

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(24, 4)

        def forward(self, x):
            hidden = self.net[:2](x)
            return self.net[2](hidden) + (self.head(hidden) if self.training else 0)

        def validation_step(self, batch, batch_idx):
            assert not self.net[0].training
            return super().validation_step(batch, batch_idx)

    class Reads(Auxiliary):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            assert self.trainer.validating or self.trainer.sanity_checking
            super().validation_step(batch, batch_idx)

    class TwoLoaders(Auxiliary):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

    @pytest.mark.parametrize("model", [Auxiliary, Reads, TwoLoaders])
    def test_it_is_what_a_validation_step_runs_in_evaluation_mode_measured_once(self, model, monkeypatch):
        made, counter, sparse = measurements(monkeypatch), FLOPsCallback(), rigl(every=1)
        loaders = [batches(8), batches(4)]
        run = trainer(counter, sparse, max_epochs=3)
        run.fit(model(), batches(8, 8), loaders[0] if model is self.Auxiliary else loaders)
        assert made == ([True, False, True] if model is self.Reads else [True, True])
        counts = sparse.sparsifier.counts
        report = counter.report()
        assert report.inference == 2 * (counts["net.0.weight"] + counts["net.2.weight"])
        assert report.forward == report.inference + 2 * counts["head.weight"]
        assert f"validation step in evaluation mode: {report.inference} per sample" in str(report)


class TestWarnings:
    @pytest.mark.parametrize("base", [Silent, Manual])
    def test_an_operator_that_is_not_counted_is_named_once(self, base):
        class Masked(base):
            def forward(self, x):
                hidden = self.net[:2](x)
                return linear(hidden, self.net[2].weight * torch.ones_like(hidden[:4]))

        counter = FLOPsCallback()
        with pytest.warns(UserWarning, match=r"not counted.*aten\.mul \(net\.2\.weight\)") as record:
            fit(counter, module=Masked(), max_epochs=2)
        assert sum("not counted" in str(warning.message) for warning in record) == 1
        assert counter.report().unknown == ("aten.mul (net.2.weight)",)
        assert counter.report().other == 2 * 96

    def test_a_sparse_layer_that_takes_no_part_is_named(self):
        module = Attends()
        module.idle = nn.Linear(8, 8)
        with pytest.warns(UserWarning, match="no product with") as record:
            fit(FLOPsCallback(), rigl(every=1), module=module, max_epochs=2)
        said = [str(warning.message) for warning in record if "no product" in str(warning.message)]
        assert len(said) == 1
        assert "no product with idle.weight was seen" in said[0]

    def test_a_batch_of_unknown_size_counts_as_one_sample(self):
        class Bag:
            """A batch that no one can look into."""

            def __init__(self, batch):
                self.batch, self.uses = batch, 0

        class Bags(Silent):
            def training_step(self, batch, batch_idx):
                batch.uses += 1
                return super().training_step(batch.batch, batch_idx)

        counter, bags = FLOPsCallback(), [Bag(batch) for batch in batches(8, 8, 8)]
        with pytest.warns(UserWarning, match="type Bag counts as one sample") as record:
            fit(counter, module=Bags(), loader=DataLoader(bags, batch_size=None))
        assert sum("one sample" in str(warning.message) for warning in record) == 1
        assert [bag.uses for bag in bags] == [1, 1, 1]  # none was shown to a copy of the module
        assert counter.report().forward == 8 * F_D  # the first batch held 8
        assert counter.report().train == 3 * 3 * 8 * F_D


class TestBatchesWithoutAProduct:
    def test_empty_batches_and_batches_that_are_none_cost_nothing(self):
        class Careful(Silent):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) if len(batch[0]) else None

        counter, empty = FLOPsCallback(), (torch.zeros(0, 16), torch.zeros(0, dtype=torch.long))
        loader = [empty, *batches(8), None, empty, *batches(8)]
        fit(counter, module=Careful(), loader=DataLoader(loader, batch_size=None))
        assert counter.report().train == 16 * 3 * F_D

    def test_a_first_batch_without_one_is_not_taken_for_the_model(self):
        class Late(Silent):
            def training_step(self, batch, batch_idx):
                late = self.global_step == 0 and batch_idx == 0
                return None if late else super().training_step(batch, batch_idx)

        counter = FLOPsCallback()
        fit(counter, module=Late())
        assert counter.report().forward_dense == F_D
