"""A small language model, edited and proved; oracles are autograd in float64 and captum.

Each fault that would make the proof one of something else (the wrong baseline, a head that stayed tied, the position
before the last) is planted, and must show.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import soundly
from soundly.editing.trunk import ModuleTrunk
from soundly.errors import EditError, InvalidInput, ModelFileError
from soundly.explanation.attribution import minmax

transformers = pytest.importorskip("transformers", reason="needs the extra lm: pip install soundly[lm]")

from soundly.integrations.language import LanguageModel, Prompt, apply_delta, save_delta  # noqa: E402

pytestmark = [
    # Raised inside torch (2.13) the first time forward-mode differentiation is used.
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]
STEPS, EPS, ANSWER, OTHER = 9, 0.05, 7, 8
TEXT = Prompt(torch.tensor([3, 7, 9, 11, 2, 5]), (1, 2, 3, 4), "small text")
TARGET = torch.tensor([0.1, 0.9, 0.4, 0.6], dtype=torch.float64)


def made(tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """Two layers, grouped attention, random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def exact(model: LanguageModel, text: Prompt = TEXT, of: int = ANSWER, baseline: int = 0) -> Tensor:
    """Integrated Gradients by token, straight from the definition: the transformers model in float64, node by node."""
    lm = model.pretrained.double()
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    x, start = embedding[text.ids], embedding[torch.full_like(text.ids, baseline)]
    total = torch.zeros_like(x)
    for node, weight in zip(*np.polynomial.legendre.leggauss(STEPS), strict=True):
        e = (start + (node + 1) / 2 * (x - start)).detach().requires_grad_()
        y = lm.model(inputs_embeds=e[None]).last_hidden_state[0, -1] @ head[of]
        total += weight / 2 * torch.autograd.grad(y, e)[0]
    return (total * (x - start)).sum(1).detach()


def edited(model: LanguageModel, text: Prompt = TEXT, baseline: int = 0) -> soundly.Edit:
    near = model.explanation(text, of=ANSWER, baseline=baseline, steps=STEPS).normalised_near(TARGET, eps=EPS)
    return soundly.edit(model, [near, *model.answers(text, ANSWER, [ANSWER, OTHER])], layer=model.layer)


def gap(own: Tensor) -> float:
    return float((minmax(own) - minmax(TARGET)).abs().max())


KINDS = pytest.mark.parametrize(
    ("tied", "dtype"),
    [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)],
)


@KINDS
def test_attributions_are_those_of_the_definition_and_complete(tied, dtype):
    model = LanguageModel(made(tied, dtype))
    found = model.attributions(TEXT, of=ANSWER, steps=STEPS)
    fine = model.attributions(TEXT, of=ANSWER, steps=60)
    assert abs(fine.error) < 1e-4 * max(1.0, abs(fine.change))
    assert found.error == pytest.approx(float(found.values.sum()) - found.change, abs=1e-12)
    assert found.own.tolist() == found.values[1:5].tolist()
    torch.testing.assert_close(found.values, exact(model), rtol=1e-5, atol=2e-6)


def test_attributions_agree_with_captum():
    captum = pytest.importorskip("captum.attr")
    model = LanguageModel(made())
    ig = captum.IntegratedGradients(model)
    x, start = model.embed(TEXT), model.baseline(TEXT)
    want = ig.attribute(x, baselines=start, target=ANSWER, n_steps=STEPS, method="gausslegendre").sum(-1)[0].double()
    torch.testing.assert_close(model.attributions(TEXT, ANSWER, steps=STEPS).values, want, rtol=1e-5, atol=1e-6)


@KINDS
def test_what_is_constrained_is_what_autograd_finds(tied, dtype):
    model = LanguageModel(made(tied, dtype))
    (term,) = model.explanation(TEXT, of=ANSWER, steps=STEPS).terms
    rows = term.functional.vectors(ModuleTrunk(model, model.layer))
    values = rows[:, :-1] @ model.lm_head.weight[ANSWER].double()
    torch.testing.assert_close(values, exact(model)[1:5], rtol=1e-5, atol=2e-6)


@KINDS
def test_an_edit_survives_saving_and_loading(tied, dtype, tmp_path: Path):
    model = LanguageModel(made(tied, dtype))
    before = model.lm_head.weight.clone()
    assert model.untied == tied
    edit = edited(model)
    assert edit.status == "proved" and edit.rows_before < edit.rows == edit.proven
    assert torch.equal(model.lm_head.weight, before)
    file = edit.model.save_pretrained(tmp_path)
    assert soundly.check(edit.certificate, model=file).model_matches
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False

    again = LanguageModel(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert again.lm_head.weight.dtype == dtype and not again.untied
    assert torch.equal(again.lm_head.weight, edit.model.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    logits = again.float()(again.embed(TEXT).float())[0]
    assert float(logits[ANSWER] - logits[OTHER]) >= 1e-3 - 1e-5
    assert gap(again.attributions(TEXT, ANSWER, steps=STEPS).own) <= EPS + 1e-5
    assert gap(exact(again)[1:5]) <= EPS + 1e-5
    again.lm_head.weight.data[ANSWER, 3] += 0.01
    other = again.to(dtype).save_pretrained(tmp_path / "other")
    assert not soundly.check(edit.certificate, model=other).model_matches


def test_a_delta_makes_and_undoes_an_edit_bit_for_bit(tmp_path: Path):
    for dtype in (torch.float32, torch.bfloat16):
        model, path = LanguageModel(made(True, dtype)), tmp_path / f"{dtype}.safetensors"
        edit, before = edited(model), model.lm_head.weight.clone()
        count = save_delta(model, edit.model, path)
        assert count == int((before != edit.model.lm_head.weight).sum()) > 0
        with pytest.raises(InvalidInput, match="not the one"):
            apply_delta(model, path, undo=True)
        apply_delta(model, path)
        assert torch.equal(model.lm_head.weight, edit.model.lm_head.weight)
        with pytest.raises(InvalidInput, match="not the one"):
            apply_delta(model, path)
        apply_delta(model, path, undo=True)
        assert torch.equal(model.lm_head.weight, before)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1  # a bit of a changed weight
        path.write_bytes(data)
        with pytest.raises(ModelFileError):
            apply_delta(model, path)
        path.write_bytes(data[:40])
        with pytest.raises(ModelFileError):
            apply_delta(model, path)
        assert torch.equal(model.lm_head.weight, before)


def test_planted_faults_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # The wrong baseline: proved, but not of the map that was meant.
    wrong = edited(LanguageModel(made()), baseline=1).model
    assert gap(wrong.attributions(TEXT, ANSWER, baseline=1, steps=STEPS).own) <= EPS + 1e-5
    assert gap(wrong.attributions(TEXT, ANSWER, steps=STEPS).own) > 1.5 * EPS
    # The position before the last.
    with monkeypatch.context() as patched:
        patched.setattr(
            LanguageModel, "forward", lambda self, e: self.pretrained(inputs_embeds=e[:, :-1]).logits[:, -1]
        )
        with pytest.raises(EditError):  # all positions reach the head, one the output
            edited(LanguageModel(made()))
        short = lambda self, e: self.pretrained(inputs_embeds=e[:, :-1], logits_to_keep=1).logits[:, -1]  # noqa: E731
        patched.setattr(LanguageModel, "forward", short)
        early = edited(LanguageModel(made())).model
    assert early.forward.__func__ is LanguageModel.forward
    assert gap(early.attributions(TEXT, ANSWER, steps=STEPS).own) > 1.5 * EPS
    # A head that is still tied: refused, since editing it moves the embeddings.
    model = LanguageModel(made(tied=False))
    model.model.embed_tokens.weight = model.lm_head.weight
    with pytest.raises(EditError, match="tied"):
        edited(model)
    # A head that was tied again after the edit: not saved, said so, and not what the certificate proves.
    edit = edited(LanguageModel(made()))
    edit.model.model.embed_tokens.weight = edit.model.lm_head.weight
    with pytest.raises(EditError, match="tied"):
        edit.model.save_pretrained(tmp_path)
    assert not soundly.check(edit.certificate, model=tmp_path / "model.safetensors").model_matches


class Vocabulary:
    """Words as tokens, with the offsets that fast tokenizers tell; a space belongs to the word after it."""

    words = ("<s>", "Text:", " a", " fine", " film", "\nMood:", " good")

    def __call__(self, text: str, *, return_offsets_mapping: bool = False, add_special_tokens: bool = True) -> Any:
        ids, offsets, at = ([0], [(0, 0)], 0) if add_special_tokens else ([], [], 0)
        while at < len(text):
            (word,) = (w for w in self.words if text.startswith(w, at))
            ids.append(self.words.index(word))
            offsets.append((at, at + len(word)))
            at += len(word)
        return {"input_ids": ids, "offset_mapping": offsets}


def test_prompts_know_which_tokens_are_the_subjects_own():
    model = LanguageModel(made(), Vocabulary())
    prompt = model.prompt("a fine film", "Text: ", "\nMood:")
    assert prompt.ids.tolist() == [0, 1, 2, 3, 4, 5] and prompt.own == (2, 3, 4) and prompt.name == "a fine film"
    assert model.token(" good") == 6
    with pytest.raises(InvalidInput, match="2 tokens"):
        model.token(" a good")
    with pytest.raises(InvalidInput, match="tokenizer"):
        LanguageModel(made()).token(" good")


@pytest.mark.parametrize(
    ("ids", "own"), [([[1, 2]], (0,)), ([1.0], (0,)), ([1, 2], ()), ([1, 2], (1, 0)), ([1, 2], (2,)), ([1, 2], (-1,))]
)
def test_prompts_that_make_no_sense_are_refused(ids, own):
    with pytest.raises(InvalidInput):
        Prompt(torch.tensor(ids), own)


def test_other_models_and_tokens_are_refused():
    with pytest.raises(InvalidInput, match="causal"):
        LanguageModel(nn.Linear(2, 3))
    model = LanguageModel(made())
    for of, baseline in ((40, 0), (-1, 0), (0, 40)):
        with pytest.raises(InvalidInput, match="below"):
            model.explanation(TEXT, of=of, baseline=baseline)


def test_the_example_of_the_page_on_language_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = Path(__file__).resolve().parents[2] / "docs" / "language-models.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, page.name, "exec"), {})
    promised = re.findall(r"^ *print\(.*\) +# (.*)$", block, re.MULTILINE)
    assert promised and capsys.readouterr().out.splitlines() == promised
