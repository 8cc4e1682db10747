"""Two streams: layers run alone give what the whole network gives, and nothing is left behind."""

import pytest
import torch
from tinies import DECODERS, ENCODERS
from torch import nn

from hf_prune.sites import base_model, find_sites
from hf_prune.statistics.streams import by_layer, by_stack, in_eval, run_layer, start_streams

families = pytest.mark.parametrize("name", sorted({*ENCODERS, *DECODERS} - {"albert"}))


def hidden_states(model, batch):
    with torch.no_grad():
        kwargs = {k: v for k, v in batch.items() if k != "labels"}
        return base_model(model)(**kwargs, output_hidden_states=True).hidden_states


@families
def test_layers_run_alone_give_what_the_network_gives(name, tiny, inputs_for):
    dense, pruned, batch = tiny(name), tiny(name), inputs_for(name)
    layers = list(by_layer(find_sites(dense)))
    (stream,) = start_streams(dense, pruned, [batch], layers)
    mask = batch["attention_mask"].bool()
    assert torch.equal(stream.mask, mask)
    expected = hidden_states(dense, batch)
    torch.testing.assert_close(stream.dense[mask], expected[0][mask])
    assert torch.equal(stream.dense, stream.pruned)
    for index, layer in enumerate(layers):
        with torch.no_grad():
            stream.dense = run_layer(base_model(dense), layer, stream.dense, stream.calls[layer])
        if index + 2 < len(expected):  # the last entry is after the final norm in some families
            torch.testing.assert_close(stream.dense[mask], expected[index + 1][mask])


def test_the_pruned_stream_is_that_of_the_pruned_network(tiny, inputs_for):
    dense, pruned, batch = tiny("bert"), tiny("bert"), inputs_for("bert")
    with torch.no_grad():
        base_model(pruned).get_submodule("encoder.layer.0.output.dense").weight.zero_()
    layers = list(by_layer(find_sites(dense)))
    (stream,) = start_streams(dense, pruned, [batch], layers)
    hidden = stream.pruned
    for layer in layers:
        with torch.no_grad():
            hidden = run_layer(base_model(pruned), layer, hidden, stream.calls[layer])
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(hidden[mask], hidden_states(pruned, batch)[-1][mask])
    assert not torch.allclose(hidden[mask], hidden_states(dense, batch)[-1][mask])


def test_nothing_is_left_behind(tiny, inputs_for):
    dense, pruned = tiny("llama"), tiny("llama")
    pruned.train()
    with in_eval(pruned, dense):
        assert not pruned.training
        start_streams(dense, pruned, [inputs_for("llama")], ["layers.0", "layers.1"])
    assert (pruned.training, dense.training) == (True, False)
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks for module in dense.modules()
    )


def test_layers_of_each_list():
    names = ["text.layers.0", "text.layers.1", "image.blocks.0"]
    assert by_stack(names) == {"text.layers": names[:2], "image.blocks": names[2:]}


def test_modes_come_back_after_an_error():
    """Each model is in the mode that it was in, whatever happened inside."""
    training, still = nn.Dropout().train(), nn.Dropout().eval()

    def fail():
        with in_eval(training, still):
            assert not training.training
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert (training.training, still.training) == (True, False)


def test_every_module_keeps_its_mode():
    """A frozen norm stays frozen while all else trains; what is new has the mode of the model."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    model[1].eval()
    with in_eval(model):
        assert not any(module.training for module in model.modules())
        model.append(nn.Linear(2, 2).eval())
    assert [module.training for module in model.modules()] == [True, True, False, True]
