"""Check the checks: golden files must catch deliberate errors in a copy of the sources.

Run as ``python tools/mutate.py [NAME...]``. For every mutation the package is copied, one text is
replaced, and the golden files of one paper are run against the copy. A mutation that no file
catches is a hole in the harness, and so is one whose text is no longer in the source: both fail.
An unchanged copy has to pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """One deliberate error: which paper's files must fail, where, and what is replaced by what."""

    name: str
    slug: str
    file: str
    old: str
    new: str

    @property
    def is_control(self) -> bool:
        return self.old == self.new


MUTATIONS = (
    Mutation(
        "efficientformer: queries and keys of all heads before the values",
        "efficientformer",
        "attention/grid/distance.py",
        ".unflatten(2, (self.num_heads, -1)).transpose(1, 2)",
        ".unflatten(2, (-1, self.num_heads)).permute(0, 3, 1, 2)",
    ),
    Mutation(
        "efficientformer: distances of rows and columns exchanged",
        "efficientformer",
        "attention/grid/distance.py",
        "(r[:, None] - r).abs() * columns + (s[:, None] - s).abs()",
        "(s[:, None] - s).abs() * columns + (r[:, None] - r).abs()",
    ),
    Mutation(
        "mobilevig: the neighbour less the centre",
        "mobilevig",
        "attention/grid/svga.py",
        "return F.relu(x - (linked",
        "return F.relu(-x + (linked",
    ),
    Mutation(
        "mobilevig: one link too few where K does not divide the side",
        "mobilevig",
        "attention/grid/svga.py",
        "links = (x.shape[dim] - 1) // step",
        "links = (x.shape[dim] - 1) // step - 1",
    ),
    Mutation(
        "minilm: the divergence with its sides exchanged",
        "minilm",
        "compress/minilm/losses.py",
        "target = teacher.exp()",
        "target = student.exp()",
    ),
    Mutation(
        "minilm: every token counts alike instead of every sample",
        "minilm",
        "compress/minilm/losses.py",
        "(real.clamp_min(1) * samples * heads)",
        "(real.sum() * heads)",
    ),
    Mutation(
        "gla: the sign of the gate's gradient",
        "gla",
        "attention/gla/fast.py",
        "db = q * dq - k * dk",
        "db = k * dk - q * dq",
    ),
    Mutation(
        "gla: the current token decays too",
        "gla",
        "attention/gla/definition.py",
        "memory = log_decay[:, :, t, :, None].exp() * memory + new",
        "memory = log_decay[:, :, t, :, None].exp() * (memory + new)",
    ),
    Mutation(
        "gla: the norm's eps in the layer",
        "gla",
        "attention/gla/module.py",
        "self.norm = RMSNorm(head_value, eps=c.norm_eps",
        "self.norm = RMSNorm(head_value, eps=1e-2",
    ),
    Mutation(
        "gla: scores off by one column",
        "gla",
        "attention/gla/fast.py",
        "(k * (r - b).exp()).mT).tril_()",
        "(k * (r - b).exp()).mT).tril_(-1)",
    ),
    Mutation(
        "flowformer: a sink does not see its own source",
        "flowformer",
        "attention/flow/causal.py",
        "lower, upper = scores.tril(), scores.triu_()",
        "lower, upper = scores.tril(-1), scores.triu_()",
    ),
    Mutation(
        "flowformer: the clamp is ten times as wide",
        "flowformer",
        "attention/flow/parts.py",
        "conserved.clamp(-clamp, clamp)",
        "conserved.clamp(-10 * clamp, 10 * clamp)",
    ),
    Mutation(
        "flowformer: eps of the flow out of a source",
        "flowformer",
        "attention/flow/bidirectional.py",
        "outgoing = product(k, query_sum, eps, outer_eps)",
        "outgoing = product(k, query_sum, 1e4 * eps, outer_eps)",
    ),
    Mutation(
        "transnormer: the norm's gradient loses a factor",
        "transnormer",
        "attention/norm/fast.py",
        "/ rms * (size / count)",
        "/ rms * (size / count) * 0.9",
    ),
    Mutation(
        "transnormer: the reflection is halved",
        "transnormer",
        "layers/lrpe.py",
        "(x @ v)[..., None], v, value=-2",
        "(x @ v)[..., None], v, value=-1",
    ),
    Mutation(
        "transnormer: the causal mask is off by one",
        "transnormer",
        "attention/diag/fast.py",
        ".triu(1)",
        ".triu(2)",
    ),
    Mutation(
        "routing: the ranks of a block are off by one",
        "routing",
        "attention/routing/relative.py",
        "first = 1 - queries - shift",
        "first = -queries - shift",
    ),
    Mutation(
        "routing: the constant beside the number of clusters is left out",
        "routing",
        "attention/routing/fast.py",
        "share = (1 / (count + eps))",
        "share = (1 / count.clamp_min(1))",
    ),
    Mutation(
        "quantizable: what is clipped keeps its gradient",
        "quantizable",
        "attention/clipped_softmax/definition.py",
        "return ((eta - gamma) * probabilities + gamma).clamp(0, 1)",
        "y = (eta - gamma) * probabilities + gamma\n    return y + (y.clamp(0, 1) - y).detach()",
    ),
    Mutation(
        "quantizable: a fully masked score passes all of its gradient",
        "quantizable",
        "models/language/quantizable/attention.py",
        "return torch.maximum(scores + bias, least.to(scores.device))",
        "return (scores + bias).clamp_min(float(least))",
    ),
    Mutation(
        "quantizable: the zero point is not rounded",
        "quantizable",
        "compress/quantizable/quantizers.py",
        "(-low / self.scale).round().clamp(*self.grid)",
        "(-low / self.scale).clamp(*self.grid)",
    ),
    Mutation(
        "urpe: the multiplier is left out forwards",
        "urpe",
        "attention/urpe/fast.py",
        "a.mul_(p.tile(p.multiplier, block))",
        "a.mul_(p.tile(p.multiplier, block).sign())",
    ),
    Mutation(
        "urpe: distances from zero on are shifted by one place",
        "urpe",
        "layers/relative.py",
        "signed >= 0, signed + 2, signed",
        "signed >= 0, signed + 1, signed",
    ),
    Mutation(
        "aaren: the sums of the second state are not rescaled",
        "aaren",
        "attention/aaren/definition.py",
        "a, b = (state_a.m - base).exp(), (state_b.m - base).exp()",
        "a, b = (state_a.m - base).exp(), torch.ones_like(state_b.m)",
    ),
    Mutation(
        "aaren: the running maximum looks ahead",
        "aaren",
        "attention/aaren/fast.py",
        "m = torch.maximum(scores.cummax(-1).values, maximum[..., None])",
        "m = torch.maximum(scores.amax(-1, keepdim=True) * 0 + scores, maximum[..., None])",
    ),
    Mutation(
        "mamba: the gradient of the decay sees the state after the token",
        "quamba",
        "attention/mamba/chunked.py",
        "e[1:].mul_(states[:-1])",
        "e[1:].mul_(states[1:])",
    ),
    Mutation(
        "mamba: the input enters without its step",
        "quamba",
        "attention/mamba/chunked.py",
        "torch.mul(c.key[..., None], (c.steps * c.value)[..., None, :], out=states)",
        "torch.mul(c.key[..., None], c.value[..., None, :], out=states)",
    ),
    Mutation(
        "mamba: the kernel's decay is read before its step has its bias",
        "quamba",
        "csrc/scan.cpp",
        "  return soft ? softplus(raw) : raw;",
        "  return soft ? softplus(raw - bias) : raw;",
    ),
    Mutation(
        "mamba: the kernel's gate opens without its slope",
        "quamba",
        "csrc/scan.cpp",
        "s.read[i] * open * (1.0f + z * (1.0f - open))",
        "s.read[i] * open",
    ),
    Mutation(
        "mamba: B and C change places",
        "quamba",
        "attention/mamba/module.py",
        "delta, k, q = self.x_proj(u)",
        "delta, q, k = self.x_proj(u)",
    ),
    Mutation(
        "mamba: the norm's eps in the model",
        "quamba",
        "models/language/mamba.py",
        "self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps)\n        self.mixer",
        "self.norm = RMSNorm(config.embed_dim, eps=1e-1)\n        self.mixer",
    ),
    Mutation(
        "quamba: the percentile is that of the last batch",
        "quamba",
        "compress/quamba/quantisers.py",
        "seen if old is None else old + self.momentum * (seen - old)",
        "seen",
    ),
    Mutation(
        "quamba: the base matrix is turned over",
        "quamba",
        "compress/quamba/hadamard.py",
        "y = base_matrix(base).to(y) @ y",
        "y = base_matrix(base).mT.to(y) @ y",
    ),
    Mutation(
        "quamba: the kernel's steps have no bias",
        "quamba",
        "csrc/int8.cpp",
        "softplus(load_real(n.dt + token * E + e, count) * n.scales[1] + shift)",
        "softplus(load_real(n.dt + token * E + e, count) * n.scales[1])",
    ),
    Mutation(
        "sla: the row sums of the softmax are left out of its gradient",
        "sla",
        "attention/block_sparse/op.py",
        "torch.bmm(g[rows], values.mT).sub_(deltas[rows])",
        "torch.bmm(g[rows], values.mT)",
    ),
    Mutation(
        "sla: negligible blocks count as marginal",
        "sla",
        "attention/sla/linear.py",
        "(block_map == 0)",
        "(block_map != 1)",
    ),
    Mutation(
        "sla: one absent key of the last block is seen",
        "sla",
        "attention/block_sparse/gathered.py",
        "absent = places >= counts.expand",
        "absent = places > counts.expand",
    ),
    Mutation(
        "lean: parts are merged without the factor of their maxima",
        "lean",
        "attention/lean/merge.py",
        "weights = (partial.m - _finite(m)[segment_ids]).exp()",
        "weights = torch.ones_like(partial.m)",
    ),
    Mutation(
        "lean: the last workers get the larger pieces",
        "lean",
        "attention/lean/plan.py",
        "p * small + min(p, larger)",
        "p * small + max(0, p - workers + larger)",
    ),
    Mutation(
        "lean: the smallest number of splits that is best, not nearly best",
        "lean",
        "attention/lean/schedule.py",
        "share >= 0.85 * best",
        "share >= best",
    ),
    Mutation(
        "orchid: the magnitude is not squared",
        "orchid",
        "attention/orchid/network.py",
        "spectrum.real.square() + spectrum.imag.square()",
        "spectrum.abs()",
    ),
    Mutation(
        "orchid: inner bins count twice in the transform's gradient",
        "orchid",
        "layers/fourier.py",
        "half[..., 1 : (n + 1) // 2] *= 0.5",
        "half[..., 1 : (n + 1) // 2] *= 1.0",
    ),
    Mutation(
        "orchid: the short convolution reads one token late",
        "orchid",
        "attention/orchid/module.py",
        "pad_length(u, weight.shape[-1] - 1, 0)",
        "pad_length(u, weight.shape[-1] - 2, 1)",
    ),
    Mutation(
        "landmark: the landmark's gradient keeps the whole mean",
        "landmark",
        "attention/landmark/fast.py",
        "mean.squeeze(-1).sub_(dr).mul_(gate)",
        "mean.squeeze(-1).mul_(gate)",
    ),
    Mutation(
        "landmark: a landmark sees itself",
        "landmark",
        "attention/landmark/fast.py",
        "hidden[:, -1] = True\n    return hidden",
        "hidden[:-1, -1] = True\n    return hidden",
    ),
    Mutation(
        "landmark: one slot between old and recent blocks is missing",
        "landmark",
        "attention/landmark/memory.py",
        "(rank + (block >= self.seen - self.top_k))",
        "(rank + 0 * block)",
    ),
    Mutation(
        "transnext: windows run over the ends of image rows",
        "transnext",
        "attention/aggregated/fast.py",
        "extra.masked_fill(outside, 0)",
        "extra",
    ),
    Mutation(
        "transnext: the length counts no pooled keys",
        "transnext",
        "attention/aggregated/fast.py",
        "inside.to(q.dtype) + pooled_key.shape[2]",
        "inside.to(q.dtype) + 0 * pooled_key.shape[2]",
    ),
    Mutation(
        "transnext: the window's gradient is spread backwards",
        "transnext",
        "attention/aggregated/fast.py",
        "out[..., start : start + count].addcmul_(weights[:, :, j : j + 1], x)",
        "out[..., length - start - count : length - start].addcmul_(weights[:, :, j : j + 1], x)",
    ),
    Mutation(
        "dualtoken: alpha weighs the summary",
        "dualtoken",
        "attention/dual_token/module.py",
        "g = self.alpha * g + (1 - self.alpha) * x_ga",
        "g = (1 - self.alpha) * g + self.alpha * x_ga",
    ),
    Mutation(
        "dualtoken: columns before rows in a merged patch",
        "dualtoken",
        "models/vision/dualtoken/blocks.py",
        "for j in (0, 1) for i in (0, 1)]",
        "for i in (0, 1) for j in (0, 1)]",
    ),
    Mutation(
        "soft: the step is that of the shifted matrix",
        "soft",
        "attention/soft/newton.py",
        "step = _STEP / matrix.sum(-1)",
        "step = _STEP / (matrix.sum(-1) + _SHIFT)",
    ),
    Mutation(
        "soft: the gradient of the inverse without its transpose",
        "soft",
        "attention/soft/newton.py",
        "return -(transposed @ grads[0] @ transposed), None",
        "return -(transposed @ grads[0].mT @ transposed), None",
    ),
    Mutation(
        "soft: the norms stand before the sums",
        "soft",
        "models/vision/soft/blocks.py",
        "x = self.norm1(x + self.dropout(self.attention(x)))",
        "x = x + self.dropout(self.attention(self.norm1(x)))",
    ),
    Mutation(
        "volo: windows are added one row late",
        "volo",
        "attention/grid/outlook/function.py",
        "start = first * stride + offset - pad if count else 0",
        "start = first * stride + offset - pad + (offset == 0) if count else 0",
    ),
    Mutation(
        "volo: token logits stay in the mixed order",
        "volo",
        "models/vision/volo/model.py",
        "token_logits = mix_tokens(token_logits.unflatten(1, grid), found).flatten(1, 2)",
        "token_logits = token_logits.clone()",
    ),
    Mutation(
        "volo: the class label is mixed by the wrong share",
        "volo",
        "models/vision/volo/losses.py",
        "label = kept * label + (1 - kept) * label.flip(0)",
        "label = (1 - kept) * label + kept * label.flip(0)",
    ),
    Mutation(
        "ia-red2: the interpreter's keys lose their bias",
        "ia-red2",
        "models/vision/ia_red2/interpreter.py",
        "torch.baddbmm(offset[..., None], reader, z.mT)",
        "torch.baddbmm(0 * offset[..., None], reader, z.mT)",
    ),
    Mutation(
        "ia-red2: a gathered batch keeps the padding as keys",
        "ia-red2",
        "models/vision/ia_red2/tokens.py",
        "real = torch.arange(most, device=x.device) < counts[:, None]",
        "real = torch.arange(most, device=x.device) <= counts[:, None]",
    ),
    Mutation(
        "a2sf: old scores are not forgotten when a token is added",
        "a2sf",
        "compress/a2sf/a2sf.py",
        "self.settings.alpha ** real.sum(-1).float()",
        "1.0 ** real.sum(-1).float()",
    ),
    Mutation(
        "a2sf: one recent token fewer is protected in the simulation",
        "a2sf",
        "compress/a2sf/simulate.py",
        "[:, :, sink : t - recent + 1]",
        "[:, :, sink : t - recent + 2]",
    ),
    Mutation(
        "ia-red2: the kept share is not squared in the reward",
        "ia-red2",
        "models/vision/ia_red2/policy.py",
        "1 - share.square()",
        "1 - share",
    ),
    Mutation(
        "masa: atoms' gradients without the coefficients",
        "masa",
        "layers/sharing/op.py",
        "coefficients.to(part)[:, None, None] * part",
        "torch.ones_like(coefficients.to(part))[:, None, None] * part",
    ),
    Mutation(
        "masa: KL the other way round",
        "masa",
        "compress/masa/mathematics.py",
        "(before.exp() * (before - after)).sum(-1)",
        "(after.exp() * (after - before)).sum(-1)",
    ),
    Mutation(
        "masa: the correction is not taken back out of the whitened space",
        "masa",
        "compress/masa/mathematics.py",
        "down = torch.linalg.solve_triangular(root, scaled, upper=True)",
        "down = scaled",
    ),
)


def run(mutation: Mutation) -> str | None:
    """Return what is wrong with the harness for this mutation, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        target = copy / "manyheads" / mutation.file
        text = target.read_text()
        if text.count(mutation.old) != 1:
            return f"the text to replace stands {text.count(mutation.old)} times in {mutation.file}"
        target.write_text(text.replace(mutation.old, mutation.new))
        environment = dict(os.environ, PYTHONPATH=str(copy), OMP_NUM_THREADS="1")
        command = [
            sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
            "tests/parity/test_golden.py", "-k", f"[{mutation.slug}/",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    expected = 0 if mutation.is_control else 1
    if done.returncode == expected and ("failed" in done.stdout) != mutation.is_control:
        return None
    return f"pytest ended with {done.returncode}, not {expected}\n{done.stdout[-2000:]}"


def main() -> int:
    """Run the named mutations, or all; returns 1 if the harness missed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names of mutations to run (none: all)")
    names = parser.parse_args().names
    chosen = [m for m in MUTATIONS if not names or any(n in m.name for n in names)]
    controls = [
        Mutation(f"{slug}: unchanged", slug, "__init__.py", "import_module\n", "import_module\n")
        for slug in sorted({m.slug for m in chosen})
    ]
    chosen += controls
    with ThreadPoolExecutor(max_workers=2) as pool:
        problems = list(pool.map(run, chosen))
    for mutation, problem in zip(chosen, problems, strict=True):
        good = "passes" if mutation.is_control else "caught"
        print(f"{good if problem is None else 'MISSED'}  {mutation.name}")
        if problem is not None:
            print(f"        {problem}")
    missed = sum(p is not None for p in problems)
    errors = len(chosen) - len(controls)
    print(f"{errors} deliberate errors and {len(controls)} controls; {missed} not as expected")
    return 1 if missed or not errors else 0


if __name__ == "__main__":
    sys.exit(main())
