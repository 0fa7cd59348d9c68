"""Short names: of the package's own parts, and of a user's, which may be defined again."""

import pytest

from lightning_rigl import SET, Method, RigL


def define(factor):
    """What a cell of a notebook does each time it runs."""

    class Scaled(RigL):
        def grow_score(self, layer):
            return factor * super().grow_score(layer)

    return Scaled


def test_a_class_defined_again_takes_over_its_name():
    first, second = define(1), define(2)
    assert type(Method.of("scaled")) is second
    assert type(Method.of("scaled")) is not first


def test_a_users_class_does_not_take_the_name_of_one_of_ours():
    own = type("RigL", (RigL,), {"__module__": "somewhere"})
    assert type(Method.of("rigl")) is RigL
    assert own is not RigL


@pytest.mark.parametrize("name", ["RIGL", "rigl", "RigL"])
def test_case_has_no_say(name):
    assert Method.of(name) == RigL()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"gradient": "at_update"}, "gradient is one of never, at_updates, every_step, got 'at_update'"),
        ({"scope": "global"}, "scope is one of layer, model, got 'global'"),
        ({"schedule": {"every": 3}}, "schedule is an UpdateSchedule or None"),
        ({"latent": True}, "latent = True asks for project"),
        ({"starts_dense": True}, "starts_dense = True asks for turnover"),
    ],
)
def test_facts_that_cannot_be_are_refused_where_a_method_is_defined(facts, message):
    with pytest.raises(TypeError, match=f"method Wrong: {message}"):
        type("Wrong", (SET,), facts)
