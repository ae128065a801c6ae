"""The model that the harness calls. B rows, N tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from manyheads.bridges.lm_eval.parts import batches, before_stop, load, pad, pick_device
from manyheads.models.language.landmark import LandmarkLM

__all__ = ["ManyheadsLM"]

_BATCH = 16
_BLOCK = 512  # tokens whose logits exist at once
_ENDS = ("<end>", "<eos>", "<|endoftext|>")


class _Wish(NamedTuple):
    """What one request of ``generate_until`` asks for."""

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None


@register_model("manyheads")
class ManyheadsLM(TemplateLM):
    """A run of ``manyheads train lm``, or a saved model of ours, for the harness.

    Texts of any length are read block by block through the model's state, so that recurrent models
    need constant memory; nothing is cut unless ``max_length`` says so. Where a tokenizer has no end
    token, a line break stands in front of a text without context.

    Args:
        run: folder that ``manyheads train lm``, ``Model.save`` or ``save_pretrained`` wrote.
        tokenizer: a ``tokenizer.json`` of ours (None: that in the folder).
        batch_size: rows at once; "auto" for 16. Landmark models read one.
        max_length: tokens that the model sees at once (None: all).
        max_gen_toks: longest answer where a task does not say.
        device: where the model runs (None: the CPU).
        seed: of sampled answers.
        max_batch_size: what the harness passes beside ``batch_size``; not used.

    Raises:
        ValueError: no model or tokenizer in the folder, or a number out of range.

    Example:
        >>> from manyheads.data import ByteTokenizer
        >>> from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> MixerLM(MixerLMConfig(embed_dim=32, num_heads=2, mixers="gla")).save(folder)
        >>> ByteTokenizer().save(folder + "/tokenizer.json")
        >>> ManyheadsLM(folder).tok_encode("hé")
        [104, 195, 169]
    """

    def __init__(
        self,
        run: str,
        tokenizer: str | None = None,
        batch_size: int | str | None = _BATCH,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        model, self.own = load(Path(run), tokenizer)
        self._device = pick_device(device)
        self.model = model.to(self._device)
        self.run, self.seed, self.max_gen_toks = str(run), seed, max_gen_toks
        rows = _BATCH if batch_size is None or str(batch_size).startswith("auto") else batch_size
        self.batch_size = 1 if isinstance(model, LandmarkLM) else int(rows)
        for name, value in (("batch_size", self.batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        self.max_length = max_length
        ends = [self.own.specials[n] for n in _ENDS if n in self.own.specials]
        self._end = ends[0] if ends else None

    @property
    def eot_token_id(self) -> int:
        """The end token, or a line break."""
        return int(self.own.encode("\n")[-1]) if self._end is None else self._end

    @property
    def tokenizer_name(self) -> str:
        return f"{type(self.own).__name__} of {self.run}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text; our tokenizers never add special tokens."""
        return self.own.encode(string).tolist()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows = []
        for i, (_, context, continuation) in enumerate(requests):
            ids = context + continuation
            if self.max_length is not None:
                ids = ids[-self.max_length - 1 :]
            # One token at least stands before the first that is scored.
            count = min(len(continuation), len(ids) - 1)
            rows.append((len(ids), i, ids, count))
        rows.sort(reverse=True)
        for part in batches(rows, self.batch_size):
            found = self._score([r[2] for r in part], [r[3] for r in part])
            for (_, i, _, _), score in zip(part, found, strict=True):
                scores[i] = score
        for (pair, _, _), score in zip(requests, scores, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, score)
        return scores

    @torch.inference_mode()
    def _score(self, rows: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
        """Return, for each row of ids, the log-likelihood of its last ``counts`` ids."""
        ids, mask = pad([torch.tensor(r) for r in rows], left=False, device=self._device)
        inputs, targets, mask = ids[:, :-1], ids[:, 1:], mask[:, 1:]
        lengths = torch.tensor([len(r) - 1 for r in rows], device=self._device)
        starts = lengths - torch.tensor(counts, device=self._device)
        state = self.model.init_state(len(rows))
        total = torch.zeros(len(rows), dtype=torch.float64, device=self._device)
        greedy = torch.ones(len(rows), dtype=torch.bool, device=self._device)
        for a in range(0, inputs.shape[1], _BLOCK):
            part = slice(a, a + _BLOCK)
            real = mask[:, part]
            every = None if bool(real.all()) else real
            logits, state = self.model.update(inputs[:, part], state, mask=every)
            places = torch.arange(a, a + logits.shape[1], device=self._device)
            scored = (places >= starts[:, None]) & (places < lengths[:, None])
            wanted = targets[:, part]
            chosen = logits.float().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
            total += chosen.masked_fill(~scored, 0).double().sum(1)
            greedy &= ((logits.argmax(-1) == wanted) | ~scored).all(1)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, each token once with all that goes before."""
        pairs: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            if self.max_length is None:
                windows = [([self.prefix_token_id], ids)] if ids else []
            else:
                rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
                windows = [make_disjoint_window(w) for w in rolled]
            pairs += [(None, context, continuation) for context, continuation in windows]
            owners += [i] * len(windows)
        totals = [0.0] * len(requests)
        for i, (score, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[i] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return answers up to the first stop text, which is left out.

        Raises:
            ValueError: an option of generation that is not known here.
        """
        answers = [""] * len(requests)
        groups: dict[_Wish, list[tuple[int, int, Tensor]]] = {}
        for i, request in enumerate(requests):
            context, options = request.args
            wish = self._wish(options)
            ids = self.own.encode(context or "\n")
            if self.max_length is not None:
                ids = ids[-max(self.max_length - wish.max_new_tokens, 1) :]
            groups.setdefault(wish, []).append((len(ids), i, ids))
        for wish, rows in groups.items():
            rows.sort(key=lambda r: r[:2])
            for part in batches(rows, self.batch_size):
                for (_, i, _), text in zip(
                    part, self._answer([r[2] for r in part], wish), strict=True
                ):
                    answers[i] = text
        for request, text in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers

    def _wish(self, options: dict[str, Any]) -> _Wish:
        left = dict(options)
        until = left.pop("until", None) or ()
        until = (until,) if isinstance(until, str) else until
        longest = [left.pop(n, None) for n in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        temperature = float(left.pop("temperature", None) or 0.0)
        samples = left.pop("do_sample", None)
        if samples and not temperature:
            temperature = 1.0
        wish = _Wish(
            tuple(s for s in until if s),
            next((int(n) for n in longest if n is not None), self.max_gen_toks),
            0.0 if samples is False else temperature,
            left.pop("top_k", None),
            left.pop("top_p", None),
        )
        if left:
            raise ValueError(f"generation options {sorted(left)} are not known: leave them away")
        return wish

    def _answer(self, prompts: list[Tensor], wish: _Wish) -> list[str]:
        ids, mask = pad(prompts, left=True, device=self._device)
        streams = [self.own.stream() for _ in prompts]
        texts, open_rows = [""] * len(prompts), set(range(len(prompts)))
        for tokens in self.model.generate(
            ids,
            max_new_tokens=wish.max_new_tokens,
            mask=None if bool(mask.all()) else mask,
            temperature=wish.temperature,
            top_k=wish.top_k,
            top_p=wish.top_p,
            eos=self._end,
            generator=torch.Generator(self._device).manual_seed(self.seed),
        ):
            for i, token in enumerate(tokens.tolist()):
                if i in open_rows:
                    texts[i] += streams[i].push(token)
                    if token == self._end or any(s in texts[i] for s in wish.until):
                        open_rows.remove(i)
            if not open_rows:
                break
        for i in open_rows:
            texts[i] += streams[i].flush()
        return [before_stop(text, wish.until) for text in texts]
