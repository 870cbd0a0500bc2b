"""RNN and LSTM against torch's cells."""
from __future__ import annotations

import pytest
import torch

from one_layer import draw, gradients_are_true, make, run
from torchcaffe.errors import CaffeError

STEPS, STREAMS, INPUTS, OUTPUTS = 4, 2, 3, 5
X, CONT, STATE = (STEPS, STREAMS, INPUTS), (STEPS, STREAMS), (1, STREAMS, OUTPUTS)
TEXT = "recurrent_param { num_output: 5 weight_filler { type: 'gaussian' } bias_filler { type: 'gaussian' } }"
EXPOSED = TEXT.replace("num_output", "expose_hidden: true num_output")
RESTARTS = torch.tensor([[0, 0], [1, 1], [1, 0], [1, 1]], dtype=torch.float64)


def torch_cell(layer):
    """torch.nn's cell with the layer's weights; torch's gates are input, forget, candidate, output."""
    lstm = layer.type == "LSTM"
    cell = (torch.nn.LSTMCell if lstm else torch.nn.RNNCell)(INPUTS, OUTPUTS, dtype=torch.float64)
    order = [0, 1, 3, 2] if lstm else [0]
    with torch.no_grad():
        for target, source in ((cell.weight_ih, 0), (cell.weight_hh, 2), (cell.bias_ih, 1)):
            target.copy_(torch.cat([layer.params[source].chunk(len(order))[i] for i in order]))
        cell.bias_hh.zero_()
    return cell


def by_cells(layer, x, cont, states):
    cell, outputs = torch_cell(layer), []
    for t in range(STEPS):
        states = [cont[t, :, None] * s for s in states]
        if layer.type == "LSTM":
            states = list(cell(x[t], tuple(states)))
            outputs.append(states[0])
        else:
            states = [cell(x[t], states[0])]
            outputs.append(torch.tanh(states[0] @ layer.params[3].t() + layer.params[4]))
    return torch.stack(outputs), states


@pytest.mark.parametrize(("kind", "states"), [("RNN", 1), ("LSTM", 2)])
class TestRecurrent:
    def test_sequences_begin_where_cont_is_zero(self, kind, states):
        layer, x = make(kind, X, CONT, text=TEXT), draw(*X)
        expected, _ = by_cells(layer, x, RESTARTS, [torch.zeros(STREAMS, OUTPUTS, dtype=torch.float64)] * states)
        assert torch.allclose(run(layer, x, RESTARTS)[0], expected)

    def test_a_pass_begins_in_the_last_state_of_the_one_before(self, kind, states):
        layer, x, ones = make(kind, X, CONT, text=TEXT), draw(*X), torch.ones(CONT, dtype=torch.float64)
        _, state = by_cells(layer, x, ones, [torch.zeros(STREAMS, OUTPUTS, dtype=torch.float64)] * states)
        run(layer, x, ones)
        assert torch.allclose(run(layer, x, ones)[0], by_cells(layer, x, ones, state)[0])

    def test_exposed_states_are_bottoms_and_tops_without_a_gradient(self, kind, states):
        layer = make(kind, X, CONT, *[STATE] * states, text=EXPOSED, tops=1 + states)
        x, initial = draw(*X), [draw(*STATE, seed=i + 1) for i in range(states)]
        expected, last = by_cells(layer, x, torch.ones(CONT, dtype=torch.float64), [s[0] for s in initial])
        top, *final = run(layer, x, torch.ones(CONT, dtype=torch.float64), *initial)
        assert torch.allclose(top, expected) and all(torch.allclose(a[0], b) for a, b in zip(final, last, strict=True))
        assert not any(s.requires_grad for s in final)
        assert torch.autograd.grad(top.sum(), [x, *initial], allow_unused=True)[1:] == (None,) * states

    def test_gradients_are_true_with_a_static_input(self, kind, states):
        layer = make(kind, X, CONT, (STREAMS, 3), *[STATE] * states, text=EXPOSED, tops=1 + states)
        assert gradients_are_true(layer, draw(*X), RESTARTS, draw(STREAMS, 3, seed=1), *(draw(*STATE).detach() for _ in range(states)))

    @pytest.mark.parametrize(("shapes", "words"), [
        ([(4, 2), CONT], "three or more axes"), ([X, (4, 3)], r"cont has shape \(4, 3\)"), ([X, CONT, (3, 3)], "static input of shape"),
        ([X, CONT, (2, 3), (2, 3)], "not 4")])
    def test_what_does_not_fit_is_refused(self, kind, states, shapes, words):
        with pytest.raises(CaffeError, match=words):
            make(kind, *shapes, text=TEXT)

    def test_another_number_of_steps_is_refused_and_of_streams_starts_anew(self, kind, states):
        layer = make(kind, X, CONT, text=TEXT)
        with pytest.raises(CaffeError, match="4 time steps"):
            layer.top_shapes((5, 2, 3), (5, 2))
        run(layer, draw(*X), torch.ones(CONT, dtype=torch.float64))
        layer.top_shapes((4, 1, 3), (4, 1))
        assert not any(s.any() for s in layer.state)


def test_an_lstm_unit_is_one_step():
    layer = make("LSTMUnit", (1, 2, 3), (1, 2, 12), (1, 2), tops=2)
    c, gates, cont = draw(1, 2, 3), draw(1, 2, 12, seed=1), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    i, f, o, g = gates.chunk(4, 2)
    expected = cont[..., None] * f.sigmoid() * c + i.sigmoid() * g.tanh()
    top, h = run(layer, c, gates, cont)
    assert torch.allclose(top, expected) and torch.allclose(h, o.sigmoid() * expected.tanh())
    assert gradients_are_true(layer, c, gates, cont)
    with pytest.raises(CaffeError, match=r"\(1, N, 4 D\)"):
        make("LSTMUnit", (1, 2, 3), (1, 2, 9), (1, 2), tops=2)
