"""The slots of an FFN's neurons."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kdb.ingest.forward.layout import FfnLayout


def test_a_dense_ffn_has_no_experts_and_its_slots_are_its_neurons():
    layout = FfnLayout(4)
    assert layout.experts([0, 3]).tolist() == [-1, -1]
    assert layout.neurons([0, 3]).tolist() == [0, 3]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_the_slot_of_an_experts_neuron_leads_back_to_both(widths):
    starts = tuple(sum(widths[:i]) for i in range(len(widths)))
    layout = FfnLayout(sum(widths), starts, n_routed=len(widths))
    for expert, width in enumerate(widths):
        for neuron in range(width):
            slot = layout.slot(expert, neuron)
            assert (layout.experts([slot]).item(), layout.neurons([slot]).item()) == (expert, neuron)
