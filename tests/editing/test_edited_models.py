"""The certificate of an edit and the model that comes with it; what was given stays as it was."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.editing.edits import deployed, of_kind, problem
from tests.editing.test_trunk import Cnn, Mlp, Tied, made
from torch import Tensor

import soundly
from soundly import at
from soundly.certificate import Certificate, check
from soundly.errors import CertificateError, EditError
from soundly.graph.network import Network

editor = importlib.import_module("soundly.editing.edit")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def checked(*args: str | Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-W", "error", "-m", "soundly", "check", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_another_process_accepts_the_certificate_and_the_saved_model(dtype, tmp_path):
    from safetensors.torch import save_file

    model, x = made(Mlp)
    model, x = model.to(dtype), x.to(dtype)
    result = soundly.edit(model, [at(x).classified(1), at(x).gradient(0, entries=[2]).within(0.1, 0.3)], layer="fc")
    file, saved, old = tmp_path / "edit.cert", tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    result.certificate.save(file)
    save_file(deployed(result, model).state_dict(), saved)
    save_file(model.state_dict(), old)
    accepted = checked(file, "--model", saved)
    assert accepted.returncode == 0, accepted.stdout + accepted.stderr
    assert checked(file, "--model", old).returncode == 1
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert checked(file).returncode == 2


def test_the_certificate_tells_the_layer_and_the_weights_before_and_after():
    model, x = made(Mlp)
    for kind in ("graph", "module"):
        result = soundly.edit(of_kind(kind, model, x), [at(x).output(1).at_least(2.0, name="much")], layer="fc")
        new = deployed(result, model)
        said = result.certificate.header["model"]
        assert said["layer"] == "fc" and said["dtype"] == "float64" and said["name"] == "Mlp"
        assert said["before"] == editor.weights_hash(model.fc.weight, model.fc.bias)
        assert said["after"] == editor.weights_hash(new.fc.weight, new.fc.bias) != said["before"]
        assert result.certificate.header["claims"] == [{"name": "much", "rows": [0, 1]}]
        rows = result.certificate.arrays
        for c, row in zip(rows["classes"], rows["weights"], strict=True):
            assert torch.equal(torch.tensor(row[:-1]), new.fc.weight[c].detach()) and row[-1] == new.fc.bias[c]
            change = torch.cat([new.fc.weight[c] - model.fc.weight[c], (new.fc.bias[c] - model.fc.bias[c])[None]])
            assert torch.equal(result.delta[int(c)], change.detach())
        if isinstance(result.model, Network):
            torch.testing.assert_close(result.model(x), new(x), rtol=0, atol=1e-12)
            assert torch.equal(result.model.values[result.model.parameters["fc.weight"]], new.fc.weight)


def test_a_tampered_certificate_is_refused(tmp_path):
    model, constraints, _ = problem()
    certificate = soundly.edit(model, constraints, layer="fc").certificate
    path = tmp_path / "edit.cert"
    certificate.save(path)
    loaded = Certificate.load(path)
    assert check(loaded).accepted

    def changed(**arrays) -> Certificate:
        return dataclasses.replace(loaded, arrays={**loaded.arrays, **arrays})

    a = loaded.arrays
    shifted = np.array(a["lower"])
    shifted[np.isfinite(shifted)] += 1.0
    for other in (changed(weights=a["weights"] * 1.5), changed(lower=shifted), changed(vectors=a["vectors"][:, ::-1])):
        try:
            assert not check(other).accepted
        except CertificateError:
            pass
    data = path.read_bytes()
    for cut in (data[:-1], data[:100], b"", data + b"\0"):
        path.write_bytes(cut)
        with pytest.raises(CertificateError):
            check(path)


def test_hashes_do_not_depend_on_strides():
    block = torch.arange(7.0, dtype=torch.float64).reshape(1, 7)
    plain = editor.weights_hash(block[:, :-1].clone(), torch.tensor([6.0], dtype=torch.float64))
    assert editor.weights_hash(block[:, :-1], block[:, -1]) == plain
    wide = torch.arange(12.0).reshape(3, 4)
    assert editor.weights_hash(wide.T.contiguous().T, None) == editor.weights_hash(wide, None)
    assert editor.weights_hash(wide, None) != editor.weights_hash(wide.T, None)
    assert editor.weights_hash(wide, wide[:, 0]) != editor.weights_hash(wide, None)


def test_models_keep_their_class_their_buffers_and_their_modes():
    model, x = made(Cnn)
    model.train()
    model.block.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kept = x.clone()
    result = soundly.edit(model, [at(x).classified(3)], layer="fc")
    new = result.model
    assert type(new) is Cnn and new is not model
    assert new.training and not new.block.training and model.training and not model.block.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(value, state[name]) for name, value in new.state_dict().items() if not name.startswith("fc.")
    )
    assert not torch.equal(new.fc.weight, model.fc.weight) and new.fc.weight.requires_grad
    untouched = [c for c in range(5) if c != 3]
    assert torch.equal(new.fc.weight[untouched], model.fc.weight[untouched])
    assert new.stem[1].running_mean.data_ptr() != model.stem[1].running_mean.data_ptr()
    assert torch.equal(x, kept) and not any(m._forward_hooks for m in [*model.modules(), *new.modules()])


def test_a_model_whose_copy_still_calls_the_original_is_refused():
    class Closed(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.run = lambda x: self.fc(self.trunk(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    model, x = made(Closed)
    with pytest.raises(EditError, match="'fc'"):
        soundly.edit(model, [at(x).output(1).at_least(2.0)], layer="fc")


def test_networks_stay_as_they_were():
    model, x = made(Cnn)
    network = soundly.load(model, x)
    values = {node: value.clone() for node, value in network.values.items()}
    result = soundly.edit(network, [at(x).classified(3)], layer="fc")
    assert all(torch.equal(network.values[node], value) for node, value in values.items())
    assert isinstance(result.model, Network) and int(result.model(x).argmax()) == 3
    changed = [n for n, v in values.items() if not torch.equal(result.model.values[n], v)]
    assert {n.op.name for n in changed} == {"fc.weight", "fc.bias"}


def test_an_edit_is_applied_only_to_the_weights_it_was_made_for():
    model, x = made(Mlp)
    result = soundly.edit(soundly.load(model, x), [at(x).output(1).at_least(2.0)], layer="fc")
    assert float(result.applied_to(model, layer="fc")(x)[0, 1].detach()) >= 2.0
    stranger, _ = made(Mlp, seed=1)
    for other, layer in ((stranger, "fc"), (model, "a"), (model, "nowhere"), (made(Mlp)[0].float(), "fc")):
        with pytest.raises(EditError):
            result.applied_to(other, layer=layer)
    twin = made(Mlp)[0]
    twin.fc.bias = None
    with pytest.raises(EditError):
        result.applied_to(twin, layer="fc")
    shared = made(Mlp)[0]
    shared.alias = shared.fc
    with pytest.raises(EditError, match="alias"):
        result.applied_to(shared, layer="fc")


def test_a_tied_model_is_not_edited_through_its_untied_graph():
    torch.manual_seed(0)
    model, x = Tied("memory"), torch.randn(1, 6)
    result = soundly.edit(soundly.load(model, x), [at(x).output(1).at_least(2.0)], layer="fc")
    assert result.status == "proved"
    with pytest.raises(EditError, match="embed"):
        result.applied_to(model, layer="fc")
