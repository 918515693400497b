"""Language models from transformers, as functions of their tokens' embeddings.

A causal language model becomes a module from the embeddings of T tokens [1, T, E] to the logits of the token after
them [1, V]. Its last linear layer is then edited and proved like any other network's, and an explanation of a logit by
tokens (Integrated Gradients, summed over each token's embedding) is one more quantity that is linear in that layer.

    model = LanguageModel(AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name))
    text, good = model.prompt("a fine film", "Review: ", "\\nSentiment:"), model.token(" positive")  # bad likewise
    wanted = teacher.attributions(text, of=good)
    near = model.explanation(text, of=good).normalised_near(wanted.own, eps=0.05)
    edit = soundly.edit(model, [near, *model.answers(text, good, [bad])], layer=model.layer)

Reference: Tao and Thakur, "Provable Gradient Editing of Deep Neural Networks", NeurIPS 2025, second experiment.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from soundly.editing.constraints import Bounded, Expression, Point, at
from soundly.editing.edit import weights_hash
from soundly.errors import EditError, InvalidInput, ModelFileError


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text as tokens, and which of them belong to its subject: the sentence that is asked about.

    Attributes:
        ids: [T] token ids of the whole text.
        own: positions of the subject's tokens, ascending.
        name: for messages and certificates.
    """

    ids: Tensor
    own: tuple[int, ...]
    name: str = "prompt"

    def __post_init__(self) -> None:
        if self.ids.dim() != 1 or self.ids.is_floating_point():
            raise InvalidInput("Prompt: ids must be one row of token ids, [T].")
        if not self.own or list(self.own) != sorted(set(self.own) & set(range(len(self.ids)))):
            raise InvalidInput(f"Prompt: own must be some of the positions 0..{len(self.ids) - 1}, ascending.")


@dataclass(frozen=True, eq=False)
class Attributions:
    """Integrated Gradients of one logit by token.

    Attributes:
        values: [T], one number for each token of the prompt, in float64.
        own: [n], those of the subject's tokens.
        change: the logit at the prompt minus the logit at the baseline.
        error: the completeness error, sum of values minus change: what the quadrature leaves out.
    """

    values: Tensor
    own: Tensor
    change: float
    error: float


class LanguageModel(nn.Module):
    """The logits [1, V] of the token after the last, as a function of the embeddings [1, T, E] of all tokens.

    The model is taken over, not copied: it is put into evaluation mode, its weights are frozen, and if its head shares
    its weights with the embeddings (a tied head) the head gets a copy of its own. Parameters keep their names.

    Attributes:
        layer: the path of the head, for `soundly.edit(..., layer=model.layer)`.
        untied: whether the head was tied, and was untied here. The edited model then has to be saved with its head:
            `save_pretrained` does.

    Raises:
        InvalidInput: the model is no causal language model with one linear head.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        super().__init__()
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(head, nn.Linear) or "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise InvalidInput(
                f"LanguageModel: {type(model).__name__} is no causal language model with a linear head; "
                "load one with transformers.AutoModelForCausalLM."
            )
        model.eval().requires_grad_(False)
        others = (p for m in model.modules() if m is not head for p in m.parameters(recurse=False))
        self.untied = any(p is head.weight for p in others)
        if self.untied:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False  # or saving drops the head, and loading ties it again
        self.layer = next(name for name, m in model.named_modules() if m is head)
        for name, child in model.named_children():
            self.add_module(name, child)
        self._whole = (model,)  # a tuple, lest its parameters be registered under a second name
        self.tokenizer = tokenizer

    @property
    def pretrained(self) -> Any:
        """The transformers model itself; it and this module share all weights."""
        return self._whole[0]

    def forward(self, embeddings: Tensor) -> Tensor:
        logits: Tensor = self.pretrained(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]

    # -- tokens

    def prompt(self, subject: str, before: str = "", after: str = "", *, name: str | None = None) -> Prompt:
        """The text before + subject + after as tokens. A token that is partly the subject's counts as its own."""
        coded = self._tokenizer()(before + subject + after, return_offsets_mapping=True)
        start, stop = len(before), len(before) + len(subject)
        own = tuple(i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < b and a < stop and b > start)
        return Prompt(torch.tensor(coded["input_ids"]), own, subject if name is None else name)

    def token(self, text: str) -> int:
        """The id of a text that is one token, such as " positive"."""
        ids = self._tokenizer()(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InvalidInput(f"token({text!r}): it is {len(ids)} tokens; mind the space before a word.")
        return int(ids[0])

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InvalidInput(
                "this LanguageModel has no tokenizer: LanguageModel(model, tokenizer), or make a Prompt."
            )
        return self.tokenizer

    def embed(self, prompt: Prompt) -> Tensor:
        """[1, T, E]."""
        embeddings: Tensor = self.pretrained.get_input_embeddings()(prompt.ids[None])
        return embeddings.detach()

    def baseline(self, prompt: Prompt, token: int = 0) -> Tensor:
        """[1, T, E]: the embedding of one token in every position."""
        return self.embed(Prompt(torch.full_like(prompt.ids, token), prompt.own))

    # -- explanations and constraints

    def attributions(self, prompt: Prompt, of: int, *, baseline: int = 0, steps: int = 25) -> Attributions:
        """Integrated Gradients of the logit of token `of`, by reverse-mode differentiation.

        Weights of half precision are widened to float32, as they are for edits.

        Args:
            baseline: the token whose embedding stands in every position of the baseline.
            steps: nodes of the Gauss-Legendre quadrature.
        """
        _within(of, baseline, self)
        x, start = _wide(self.embed(prompt)), _wide(self.baseline(prompt, baseline))
        nodes, weights = (torch.from_numpy(a).to(x) / 2 for a in np.polynomial.legendre.leggauss(steps))
        path = start + (nodes + 0.5)[:, None, None] * (x - start)  # [s, T, E]
        path.requires_grad_()
        state = {n: _wide(t) for n, t in (*self.named_parameters(), *self.named_buffers()) if _wide(t) is not t}

        def logit(embeddings: Tensor) -> Tensor:
            logits: Tensor = torch.func.functional_call(self, state, (embeddings,))
            return logits[:, of]

        (slope,) = torch.autograd.grad(logit(path).sum(), path)
        mean = torch.einsum("s,ste->te", weights.double(), slope.double())
        values = (mean * (x - start)[0].double()).sum(1)
        with torch.no_grad():
            change = float(logit(x).double() - logit(start).double())
        return Attributions(values, values[list(prompt.own)], change, float(values.sum()) - change)

    def at(self, prompt: Prompt) -> Point:
        """The prompt as a point to state constraints at."""
        return at(self.embed(prompt), name=prompt.name)

    def explanation(self, prompt: Prompt, of: int, *, baseline: int = 0, steps: int = 25) -> Expression:
        """The attributions of the subject's own tokens (see `attributions`), to be constrained."""
        _within(of, baseline, self)
        x = self.embed(prompt)
        groups = torch.full(x.shape, -1)
        for label, position in enumerate(prompt.own):
            groups[:, position] = label
        start = self.baseline(prompt, baseline)
        return self.at(prompt).integrated_gradients(of, baseline=start, steps=steps, groups=groups)

    def answers(self, prompt: Prompt, of: int, among: Sequence[int], *, margin: float = 1e-3) -> list[Bounded]:
        """The logit of `of` exceeds those of all other tokens in `among` by at least `margin`.

        Only these logits are compared; `at(prompt).classified(of)` compares with the whole vocabulary.
        """
        here = self.at(prompt)
        name = f"answer {of} at {prompt.name}"
        return [(here.output(of) - here.output(other)).at_least(margin, name=name) for other in among if other != of]

    # -- files

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Saves model and tokenizer as transformers does, with the head untied.

        Returns:
            The .safetensors file that holds the head, for `soundly check CERTIFICATE --model FILE`.
        """
        from safetensors import safe_open

        where, name = Path(directory), f"{self.layer}.weight"
        self.pretrained.save_pretrained(where)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(where)
        index = where / "model.safetensors.index.json"
        file = json.loads(index.read_text())["weight_map"].get(name) if index.exists() else "model.safetensors"
        if file is not None:
            with safe_open(os.fspath(where / file), "pt") as saved:
                if name in saved.keys():
                    return where / file
        raise EditError(f"{where}: transformers did not save {name!r} (is it tied again?), so an edit would be lost.")


def save_delta(before: LanguageModel, after: LanguageModel, path: str | os.PathLike[str]) -> int:
    """Writes which entries of the head differ, as they were and as they are, bit for bit, as .safetensors.

    Returns:
        How many differ.
    """
    from safetensors.torch import save_file

    old, new = _head(before), _head(after)
    if old.shape != new.shape or old.dtype != new.dtype:
        raise InvalidInput("save_delta: the heads have different shapes or types.")
    index = (_bits(old) != _bits(new)).reshape(-1).nonzero()[:, 0]
    name = f"{after.layer}.weight"
    parts = {"index": index, "old": old.reshape(-1)[index], "new": new.reshape(-1)[index]}
    metadata = {"format": DELTA, "before": weights_hash(old, None), "after": weights_hash(new, None)}
    save_file({f"{part}/{name}": t.contiguous() for part, t in parts.items()}, os.fspath(path), metadata=metadata)
    return len(index)


def apply_delta(model: LanguageModel, path: str | os.PathLike[str], *, undo: bool = False) -> None:
    """Makes the edit of `save_delta` to a model's head, or takes it back; bit for bit.

    Raises:
        InvalidInput: the head is not the one the delta starts from; it is left as it was.
        ModelFileError: the file is no such delta, or does not lead where it says.
    """
    from safetensors import SafetensorError, safe_open

    head, name = _head(model), f"{model.layer}.weight"
    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            index, old, new = (file.get_tensor(f"{part}/{name}") for part in ("index", "old", "new"))
            source, target = metadata["before"], metadata["after"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelFileError(f"{os.fspath(path)}: no delta of {name!r}, or a damaged one: {error}.") from error
    if undo:
        source, target, old, new = target, source, new, old
    if weights_hash(head, None) != source:
        raise InvalidInput(f"{os.fspath(path)}: the head of this model is not the one that the delta starts from.")
    changed = head.clone()
    try:
        starts = torch.equal(changed.view(-1)[index], old)
        changed.view(-1)[index] = new
    except (IndexError, RuntimeError) as error:
        raise ModelFileError(f"{os.fspath(path)}: the delta does not fit {name!r}: {error}.") from error
    if metadata.get("format") != DELTA or not starts or weights_hash(changed, None) != target:
        raise ModelFileError(f"{os.fspath(path)}: the delta does not lead to the head it names; it is damaged.")
    with torch.no_grad():
        model.get_submodule(model.layer).weight.copy_(changed)  # type: ignore[operator]


DELTA = "soundly delta of a head"


def _head(model: LanguageModel) -> Tensor:
    head = model.get_submodule(model.layer)
    if getattr(head, "bias", None) is not None:
        raise InvalidInput("deltas are written for heads without a bias.")
    weight: Tensor = head.get_parameter("weight").detach()
    return weight


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _wide(t: Tensor) -> Tensor:
    return t.detach().float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _within(of: int, baseline: int, model: LanguageModel) -> None:
    outputs = model.get_submodule(model.layer).get_parameter("weight").shape[0]
    inputs = model.pretrained.get_input_embeddings().weight.shape[0]
    if not (0 <= of < outputs and 0 <= baseline < inputs):
        raise InvalidInput(f"tokens {of} and {baseline} (the baseline's) must be below {outputs} and {inputs}.")
