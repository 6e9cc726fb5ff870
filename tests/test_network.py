import pickle

import jax.numpy as jnp
import numpy as np
import pytest

import bayeskernel as bk
from bayeskernel.errors import InputError
from bayeskernel.sharing import labels_of

BAD = {
    "width zero": ({"width": 0}, "width: expected an integer >= 1"),
    "width fractional": ({"width": 2.5}, "width: expected an integer"),
    "noise zero": ({"noise": 0}, "noise: expected a finite number > 0"),
    "noise array": ({"noise": np.ones(2)}, "noise: expected a positive number"),
    "scale negative": ({"recurrent_std": -1.0}, "recurrent_std: expected"),
    "scale nan": ({"input_std": float("nan")}, "input_std: expected"),
    "scale text": ({"readout_std": "1"}, "readout_std: expected"),
    "unknown activation": ({"activation": "gelu"}, "activation: expected one of"),
    "activation not callable": ({"activation": 3}, "activation: expected one of"),
    "activation reduces": ({"activation": jnp.sum}, "activation: expected a callable"),
    "activation fails": ({"activation": lambda x: x @ x @ x}, "activation: expected a callable"),
    "unknown sharing": ({"sharing": "shared"}, "sharing: expected 'tied', 'untied'"),
    "fractional labels": ({"sharing": [0.0, 1.5]}, "sharing: expected 'tied', 'untied'"),
    "unknown scaling": ({"scaling": "ntk"}, "scaling: expected 'mean_field' or 'standard'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    settings, message = BAD[name]
    with pytest.raises(InputError) as caught:
        bk.Network(**{"width": 8, **settings})
    assert message in str(caught.value)


@pytest.mark.parametrize("sharing", [[0, 1], bk.Sharing(recurrent=[0, 1])])
def test_labels_of_wrong_length(sharing):
    with pytest.raises(InputError, match="expected 3 labels, one per step, got 2"):
        labels_of(sharing, 3)


def test_equal_sharing_gives_equal_labels():
    tied, untied = labels_of("tied", 3), labels_of("untied", 3)
    assert labels_of([5, 5, 5], 3) == tied
    assert labels_of([2, 7, 1], 3) == untied
    # The recurrent label of the first step is never used.
    first = bk.Sharing([9, 1, 1], [0, 0, 0], [0, 0, 0])
    assert labels_of(first, 3) == tied
    assert labels_of("tied", 1) == labels_of("untied", 1)


def test_masks_say_where_weights_are_shared():
    labels = labels_of(bk.Sharing([0, 0, 1, 1], "untied", [0, 1, 1, 0]), 4)
    recurrent, inputs, readout = (
        np.equal.outer(own, own) for own in (labels.recurrent, labels.input, labels.readout)
    )
    assert np.array_equal(recurrent[1:, 1:], [[1, 0, 0], [0, 1, 1], [0, 1, 1]])
    assert np.array_equal(inputs, np.eye(4))
    assert np.array_equal(readout[0], [1, 0, 0, 1])
    counts = [max(own) + 1 for own in (labels.recurrent, labels.input, labels.readout)]
    assert counts == [2, 4, 2]


def test_activations():
    x = jnp.array([-0.5, 0.0, 1.0])
    erf = bk.Network(8, activation="erf").phi
    # Slope one at the origin is what the scale sqrt(pi)/2 is for.
    assert float(erf(jnp.array(1e-3))) == pytest.approx(1e-3, rel=1e-5)
    assert bk.Network(8, activation=jnp.sin).phi.odd
    assert not bk.Network(8, activation=jnp.cos).phi.odd
    assert not bk.Network(8, activation="relu").phi.odd
    assert np.allclose(bk.Network(8, activation="relu").phi(x), [0, 0, 1])


def cube(x):
    return x**3


@pytest.mark.parametrize("activation", ["linear", "erf", "tanh", "relu", cube])
def test_networks_can_be_sent_to_other_processes(activation):
    network = bk.Network(8, activation)
    again = pickle.loads(pickle.dumps(network))
    assert again == network
    assert again.phi.name == network.phi.name
    assert float(again.phi(0.5)) == float(network.phi(0.5))
