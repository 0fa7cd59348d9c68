"""Every kind of module in the real Trainer: what is sparse, that it stays so, and that the rest trains."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_rigl import RigLCallback, Sparsifier, UpdateSchedule
from tests.callbacks.problems import trainer

ROWS = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
SEQUENCES = torch.randn(32, 5, 6, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(32, 4, 6, 6, generator=torch.Generator().manual_seed(3))
WORDS = torch.arange(160).view(32, 5) % 10


class Host(pl.LightningModule):
    """Trains any network towards noise."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        output = self.net(batch[0])
        output = output[0] if isinstance(output, tuple) else output
        return (output - batch[1].view(-1, *[1] * (output.dim() - 1))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05, momentum=0.9)


class Contract(pl.Callback):
    """After each batch: the first counts, zeros where inactive, the first storage of every parameter."""

    def __init__(self, rigl):
        self.rigl = rigl

    def on_train_start(self, trainer, module):
        self.first = {name: mask.clone() for name, mask in self.rigl.masks.items()}
        self.storage = storage(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        assert storage(module) == self.storage
        for name, mask in self.rigl.masks.items():
            assert mask.sum() == self.first[name].sum()
            assert (module.get_parameter(name)[~mask] == 0).all()


def storage(module):
    return {name: p.data_ptr() for name, p in module.named_parameters()}


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def fit(module, inputs, *callbacks, epochs=2, method="rigl", **settings):
    """Eight batches an epoch, updates at steps 3, 6 and 9, the contract after each batch."""
    schedule = UpdateSchedule(every=3, end=12, drop_fraction=0.5)
    rigl = RigLCallback(0.5, method, schedule=schedule, seed=0, **settings)
    contract = Contract(rigl)
    noise = torch.randn(len(inputs), generator=torch.Generator().manual_seed(4))
    loader = DataLoader(TensorDataset(inputs, noise), batch_size=4)
    trainer(*callbacks, rigl, contract, max_epochs=epochs).fit(module, loader)
    return rigl, contract


def then(*layers):
    """A network that starts with these layers and ends in a dense Linear, which has the last name."""
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, 3))


class LoRA(nn.Module):
    """A frozen layer and two trainable factors, as modules or as bare parameters."""

    def __init__(self, bare=False):
        super().__init__()
        self.base = nn.Linear(6, 8).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        if bare:
            self.lora_A, self.lora_B = self.lora_A.weight, self.lora_B.weight

    def forward(self, x):
        if isinstance(self.lora_A, nn.Parameter):
            return self.base(x) + x @ self.lora_A.T @ self.lora_B.T
        return self.base(x) + self.lora_B(self.lora_A(x))


class LanguageModel(nn.Module):
    """The head has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(10, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        return self.head(torch.tanh(self.body(self.embed(words))))


class Attention(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.attention, self.width = nn.MultiheadAttention(6, 2, batch_first=True, **sizes), sizes.get("kdim")

    def forward(self, x):
        return self.attention(x, x[..., : self.width], x[..., : self.width])


def tied_layers():
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    return net


def shared_layer():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


def initialised():
    net = nn.Sequential(nn.LazyConv1d(8, 1), nn.Flatten(), nn.LazyLinear(3))
    net(SEQUENCES)
    return net


def padded():
    return nn.Sequential(nn.Embedding(10, 6, padding_idx=0), nn.Linear(6, 3))


def depthwise():
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 4, 1))


def spectral():
    return then(parametrizations.spectral_norm(nn.Linear(6, 8)))


def lstm():
    return nn.LSTM(6, 5, batch_first=True, bidirectional=True)


ORIGINAL = "0.parametrizations.weight.original"
GATES = ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]
SEPARATE = [f"attention.{n}" for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")]
KINDS = {  # network, its inputs, the sparse parameters, the settings
    "weight norm": (lambda: then(parametrizations.weight_norm(nn.Linear(6, 8))), ROWS, ["2.weight"], {}),
    "spectral norm": (spectral, ROWS, ["2.weight"], {}),
    "spectral norm by regex": (spectral, ROWS, [ORIGINAL], {"include": [r"weight\.original$"]}),
    "old weight norm": (lambda: then(nn.utils.weight_norm(nn.Linear(6, 8))), ROWS, ["2.weight"], {}),
    "tied layers": (tied_layers, ROWS, ["0.weight"], {}),
    "tied to an embedding": (LanguageModel, WORDS, ["body.weight"], {}),
    "tied, by regex": (LanguageModel, WORDS, ["embed.weight"], {"include": ["embed"]}),
    "shared": (shared_layer, ROWS, ["0.weight"], {}),
    "LSTM": (lstm, SEQUENCES, GATES, {}),
    "GRU": (lambda: nn.GRU(6, 5, batch_first=True), SEQUENCES, GATES[:2], {}),
    "attention": (Attention, SEQUENCES, ["attention.in_proj_weight", "attention.out_proj.weight"], {}),
    "attention with kdim": (lambda: Attention(kdim=4, vdim=4), SEQUENCES, SEPARATE, {}),
    "lazy, initialised": (initialised, SEQUENCES, ["0.weight", "2.weight"], {}),
    "depthwise": (depthwise, IMAGES, ["1.weight"], {}),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), IMAGES, ["weight"], {}),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), IMAGES, ["weight"], {}),
    "1d": (lambda: nn.Conv1d(5, 8, 3), SEQUENCES, ["weight"], {}),
    "3d": (lambda: nn.Conv3d(4, 6, 2), IMAGES[:, :, None].repeat(1, 1, 2, 1, 1), ["weight"], {}),
    "embedding by regex": (padded, WORDS, ["0.weight"], {"include": [r"^net\.0"]}),
    "LoRA": (lambda: then(LoRA()), ROWS, ["0.lora_A.weight", "0.lora_B.weight", "2.weight"], {}),
    "LoRA, excluded": (lambda: then(LoRA()), ROWS, ["2.weight"], {"exclude": ["lora_"]}),
    "LoRA of bare parameters": (lambda: then(LoRA(bare=True)), ROWS, ["2.weight"], {}),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_chosen_trains_sparse_and_the_rest_trains(kind):
    make, inputs, expected, settings = KINDS[kind]
    module = Host(make())
    before, place = values(module), storage(module)
    rigl, contract = fit(module, inputs, **settings)
    assert list(rigl.masks) == [f"net.{name}" for name in expected]
    assert rigl.sparsifier.updates == 3
    assert rigl.sparsifier.density == pytest.approx(0.5, abs=0.02)
    assert any((rigl.masks[name] != mask).any() for name, mask in contract.first.items())
    assert storage(module) == place
    for name, parameter in module.named_parameters():
        stayed = rigl.masks[name] & contract.first[name] if name in rigl.masks else torch.tensor(True)
        assert bool((parameter != before[name])[stayed.expand_as(parameter)].any()) == parameter.requires_grad


def test_a_pattern_may_use_any_name_of_a_tied_weight():
    assert list(fit(Host(LanguageModel()), WORDS, include=["head"])[0].masks) == ["net.embed.weight"]
    rigl, _ = fit(Host(LanguageModel()), WORDS, include=["net"], exclude=[r"head\.weight"])
    assert list(rigl.masks) == ["net.body.weight"]


def test_the_zeros_of_an_embeddings_padding_are_no_sign_of_training(recwarn):
    fit(Host(padded()), WORDS, include=["net.0"])
    assert not [w for w in recwarn if "trained before" in str(w.message)]


def test_the_effective_weight_of_spectral_norm_has_the_zeros():
    module = Host(spectral())
    rigl, _ = fit(module, ROWS, include=["original"])
    assert ((module.net[0].weight != 0) == rigl.masks[f"net.{ORIGINAL}"]).all()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    ("norm", "pattern"),
    [(parametrizations.weight_norm, r"weight\.original1"), (nn.utils.weight_norm, "weight_v")],
)
def test_the_direction_of_weight_norm_is_refused(norm, pattern):
    """A row without connections has the norm 0, and weight_norm divides by it."""
    module = Host(then(norm(nn.Linear(6, 8))))
    before = values(module)
    with pytest.raises(ValueError, match="weight_norm, which divides each row by its norm"):
        fit(module, ROWS, include=[pattern])
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())


@pytest.mark.parametrize("kind", [lstm, lambda: nn.GRU(6, 5, 2)], ids=["LSTM", "GRU"])
def test_the_flat_weights_of_an_rnn_are_its_parameters(kind):
    """What cuDNN reads is what is masked, and flattening once more changes no result."""
    module = Host(kind())
    fit(module, SEQUENCES)
    flat = module.net._flat_weights
    assert all(a is b for a, b in zip(flat, module.net.parameters(), strict=True))
    output = module.net(SEQUENCES)[0]
    module.net.flatten_parameters()
    copy = kind()
    copy.load_state_dict(module.net.state_dict())
    assert torch.equal(module.net(SEQUENCES)[0], output)
    assert torch.equal(copy(SEQUENCES)[0], output)


class Backbone(Host):
    def __init__(self):
        super().__init__(None)
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.net = lambda x: self.head(self.backbone(x))


def test_a_backbone_that_thaws_stays_dense():
    """BackboneFinetuning freezes it in setup and adds it to the optimizer later."""
    module = Backbone()
    before = values(module)
    with pytest.warns(
        UserWarning, match=r"backbone\.0\.weight, backbone\.3\.weight were frozen .* stay dense"
    ):
        rigl, _ = fit(module, ROWS, BackboneFinetuning(1, backbone_initial_lr=0.01))
    assert list(rigl.masks) == ["head.weight"]
    assert rigl.sparsifier.updates == 3  # the third after the thaw
    assert all((p != before[name]).any() for name, p in module.named_parameters())
    assert all((module.backbone[i].weight != 0).all() for i in (0, 3))


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_layer_that_is_frozen_in_training_keeps_weights_and_topology(method):
    class Freeze(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                module.net[0].requires_grad_(False)
                self.weight = module.net[0].weight.detach().clone()

    module, freeze = Host(then(nn.Linear(6, 8))), Freeze()
    rigl, contract = fit(module, ROWS, freeze, method=method)
    assert torch.equal(module.net[0].weight, freeze.weight)
    assert ((freeze.weight != 0) <= rigl.masks["net.0.weight"]).all()
    assert (rigl.masks["net.0.weight"] != contract.first["net.0.weight"]).any()  # by updates 3 and 6


def test_a_network_made_in_configure_model():
    class Late(Host):
        def configure_model(self):
            self.net = self.net or then(nn.Linear(6, 8))

    module = Late(None)
    rigl, _ = fit(module, ROWS)
    assert list(rigl.masks) == ["net.0.weight", "net.2.weight"]
    assert rigl.sparsifier.updates == 3


class TestRefusals:
    """In words, and before anything is changed."""

    def refused(self, net, error, message, **settings):
        module = Host(net)
        dense = net[-1].weight.detach().clone()
        with pytest.raises(error, match=message):
            fit(module, ROWS, **settings)
        assert torch.equal(net[-1].weight, dense)

    @pytest.mark.parametrize("init", ["random", "magnitude"])
    def test_lazy(self, init):
        net = then(nn.LazyLinear(8))
        self.refused(net, ValueError, r"net\.0\.weight is not initialised yet \(a lazy module\)", init=init)

    def test_pruned(self):
        layer = nn.Linear(6, 8)
        prune.random_unstructured(layer, "weight", 0.5)
        net = then(layer)
        first = layer.weight_orig.detach().clone()
        self.refused(net, MisconfigurationException, r"net\.0\.weight_orig: pruned .*prune\.remove")
        assert torch.equal(layer.weight_orig, first)
        kept = layer.weight_mask.bool()
        prune.remove(layer, "weight")
        _, contract = fit(Host(net), ROWS, init="nonzero", include=["0"])
        assert torch.equal(contract.first["net.0.weight"], kept)

    @pytest.mark.parametrize("init", ["random", "magnitude", "nonzero"])
    @pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
    @pytest.mark.filterwarnings("ignore:Sparse .* tensor support")
    def test_a_sparse_layout(self, layout, init):
        layer = nn.Linear(6, 8)
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse(layout=layout))
        self.refused(then(layer), ValueError, r"net\.0\.weight has the layout .*to_dense\(\)", init=init)

    @pytest.mark.parametrize("init", ["random", "magnitude", "nonzero"])
    def test_the_meta_device(self, init):
        """Lightning refuses such a module by itself; this is the plain loop."""
        net = then(nn.Linear(6, 8, device="meta"))
        dense = net[-1].weight.detach().clone()
        with pytest.raises(ValueError, match=r"^0\.weight is on the meta device"):
            Sparsifier(net, 0.5, init=init)
        assert torch.equal(net[-1].weight, dense)
