"""One pass inside a Tracer, and what it found, for the tests of this folder."""

from torch.utils.flop_counter import FlopCounterMode

from lightning_rigl.flops.tracer import Tracer


def measure(net, *inputs, samples=None, call=None, backward=False, inference=False):
    """The costs per sample; ``samples`` is the first dimension of the first input where it is not given."""
    with Tracer(dict(net.named_parameters()), net.buffers(), inference) as tracer:
        out = (call or net)(*inputs)
        if backward:
            total(out).backward()
    return tracer.table(samples or inputs[0].shape[0])


def costs(table):
    """Forward FLOPs by parameter, all slices of one together."""
    names = dict.fromkeys(layer.name for layer in table.layers)
    return {name: sum(layer.forward for layer in table.layers if layer.name == name) for name in names}


def rows(table):
    """Multiply-adds by key: forward, gradient of the input, gradient of the weight; of what is trained."""
    return {
        layer.key: tuple(flops // 2 for flops in (layer.forward, layer.input_gradient, layer.weight_gradient))
        for layer in table.layers
        if layer.forward or not layer.no_gradient
    }


def without_gradient(table):
    """Multiply-adds of forward passes with gradients disabled, by key."""
    return {layer.key: layer.no_gradient // 2 for layer in table.layers if layer.no_gradient}


def second_opinion(net, *inputs, call=None, backward=False):
    """FLOPs of the batch by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        out = (call or net)(*inputs)
        if backward:
            total(out).backward()
    return counter.get_total_flops()


def total(out):
    """A loss that depends on everything."""
    if isinstance(out, (tuple, list)):
        return sum(total(o) for o in out if o is not None)
    return out.sum()
