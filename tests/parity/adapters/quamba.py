"""Mamba-1: scan, block and model (official tensors are channels first, (B, E, L)); and Quamba:
observers, rotations, the simulated and the integer W8A8 block, the simulated model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.attention import MambaConfig, MambaMixer, selective_scan
from manyheads.compress.quamba import (
    OFFICIAL_SITES,
    SITES,
    WEIGHT_NAMES,
    AsymmetricObserver,
    Int8Mamba,
    MinMaxObserver,
    PercentileObserver,
    Quamba,
    SimulatedMamba,
    activation_scales,
    calibrate_block,
    fake_quant,
    fake_quant_dynamic,
    hadamard_matrix,
    hadamard_transform,
)
from manyheads.models.language.mamba import MambaForCausalLM, MambaLMConfig
from parity.golden import Golden, adapter


@adapter("quamba", "selective_scan")
def scan(golden: Golden) -> dict[str, Tensor]:
    golden.options("B", "D", "N", "L", "G", "delta_softplus")
    names = [n for n in golden.inputs if n not in ("grad_y", "grad_last_state")]
    leaves = dict(zip(names, golden.leaves(*names), strict=True))
    y, state = selective_scan(
        *(leaves[n] for n in ("u", "delta", "A", "B", "C")),
        d=leaves.get("D"),
        z=leaves.get("z"),
        delta_bias=leaves.get("delta_bias"),
        delta_softplus=golden.config.get("delta_softplus", True),
        initial_state=leaves.get("initial_state"),
    )
    total = (y * golden.inputs["grad_y"]).sum()
    if (grad := golden.inputs.get("grad_last_state")) is not None:
        total = total + (state * grad).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    results = {f"grad.{n}": g for n, g in zip(leaves, grads, strict=True)}
    return results | {"out.y": y, "out.last_state": state}


@adapter("quamba", "mamba_block")
def block(golden: Golden) -> dict[str, Tensor]:
    options = golden.options(
        "d_inner", d_model="embed_dim", d_state="state_dim", d_conv="conv_size",
        expand="expand", dt_rank="dt_rank", conv_bias="conv_bias", bias="proj_bias",
    )  # fmt: skip
    if options.get("dt_rank") == "auto":
        options["dt_rank"] = None
    module = MambaMixer(MambaConfig(**options)).load_official(golden.weights).eval()
    (x,) = golden.leaves("x")
    y = module(x)
    results = {"out.y": y}
    if "grad_y" in golden.inputs or "grad.x" in golden.tensors:
        y.backward(golden.inputs.get("grad_y", torch.ones_like(y)))
        assert x.grad is not None
        weights = module.key_map().to_official(
            {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        )
        results |= {f"grad.{n}": g for n, g in ({"x": x.grad} | weights).items()}
        results |= {f"grad.w.{n}": g for n, g in weights.items()}
    with torch.no_grad():
        state, steps = module.init_state(x.shape[0]), []
        for token in x.unbind(1):
            out, state = module.step(token, state)
            steps.append(out)
        limit = float(golden.meta["atol"])
        torch.testing.assert_close(torch.stack(steps, 1), y, atol=limit, rtol=0)
        whole = module.update(x, module.init_state(x.shape[0]))[1]
        torch.testing.assert_close(tuple(whole), tuple(state), atol=limit, rtol=0)
    return results | {"out.conv_state": state.conv, "out.ssm_state": state.ssm}


@adapter("quamba", "mamba_lm_tiny")
def language_model(golden: Golden) -> dict[str, Tensor]:
    inner = {"d_state", "d_conv", "expand", "dt_rank"}
    official = {k: v for k, v in golden.config.items() if k not in inner}
    official["ssm_cfg"] = {k: v for k, v in golden.config.items() if k in inner}
    # These files state the size of the vocabulary as it is, padding included.
    config = MambaLMConfig.from_official({"pad_vocab_size_multiple": 1} | official)
    model = MambaForCausalLM(config).load_official(golden.weights).eval()
    tokens = golden.inputs["input_ids"]
    logits = model(tokens)
    streamed, state = model.update(tokens[:, :-1], model.init_state(tokens.shape[0]))
    last, _ = model.step(tokens[:, -1], state)
    torch.testing.assert_close(
        torch.cat((streamed, last[:, None]), 1), logits, atol=float(golden.meta["atol"]), rtol=0
    )
    return {"out.logits": logits}


@adapter("quamba", "observers_and_quantisers")
def observers(golden: Golden) -> dict[str, Tensor]:
    golden.options("n_bits", "percentile_sigma", "asym_clip_ratio")
    c, bits = golden.config, golden.config["n_bits"]
    batches = [golden.inputs[f"x{i}"] for i in range(len(golden.inputs))]
    largest, spread = MinMaxObserver(bits=bits), AsymmetricObserver(c["asym_clip_ratio"], bits=bits)
    for x in batches:
        largest.update(x)
        spread.update(x)
    x = batches[1]
    results = {
        "out.minmax_scale": largest.scale,
        "out.asym_scale": spread.scale,
        "out.asym_base": spread.base,
        "out.fake_quant_x1_asym": fake_quant(x, spread.scale, base=spread.base, bits=bits),
    }
    for name in golden.outputs:
        if name.startswith("percentile_") and name.endswith("_scale"):
            alpha = name.split("_")[1]
            observer = PercentileObserver(float(alpha), momentum=c["percentile_sigma"], bits=bits)
            running = []
            for batch in batches:
                observer.update(batch)
                assert observer.largest is not None
                running.append(observer.largest)
            results[f"out.percentile_{alpha}_running_max"] = torch.stack(running)
            results[f"out.{name}"] = observer.scale
            read = fake_quant(x, observer.scale, bits=bits)
            results[f"out.fake_quant_x1_percentile_{alpha}"] = read
        elif name.startswith("dyn_per_"):
            granularity, *rest = name.removeprefix("dyn_per_").removesuffix("_x1").split("_")
            own = int(rest[0].removesuffix("bit")) if rest else bits
            results[f"out.{name}"] = fake_quant_dynamic(x, per=granularity, bits=own)
    return results


@adapter("quamba", "hadamard")
def rotations(golden: Golden) -> dict[str, Tensor]:
    golden.options("sizes")
    results = {}
    for n in golden.config["sizes"]:
        results[f"out.y{n}"] = hadamard_transform(golden.inputs[f"x{n}"])
        results[f"out.H{n}"] = hadamard_matrix(n)
    return results


def _block(golden: Golden, *others: str) -> MambaMixer:
    options = golden.options(
        *others, d_model="embed_dim", d_state="state_dim", d_conv="conv_size",
        expand="expand", dt_rank="dt_rank",
    )  # fmt: skip
    return MambaMixer(MambaConfig(**options)).load_official(golden.weights).eval()


def _calibration(golden: Golden) -> list[Tensor]:
    count = sum(name.startswith("calib") for name in golden.inputs)
    return [golden.inputs[f"calib{i}"] for i in range(count)]


def _percentile(config: dict[str, Any]) -> float | None:
    return config["percentile_alpha"] if config.get("percentile_u", True) else None


@adapter("quamba", "block_w8a8_naive_static", "block_w8a8_quamba")
@torch.no_grad()
def simulated_block(golden: Golden) -> dict[str, Tensor]:
    block = _block(golden, "percentile_u", "percentile_alpha", "hadamard", "n_bits", "d_inner")
    assert golden.config.get("n_bits", 8) == 8
    hadamard = golden.config["hadamard"]
    scales = calibrate_block(
        block, _calibration(golden), percentile=_percentile(golden.config), hadamard=hadamard
    )
    quantised = SimulatedMamba.from_float(block, scales, hadamard=hadamard)
    x = golden.inputs["x"]
    y, _, seen = quantised.trace(x)
    state, steps = quantised.init_state(len(x)), []
    for token in x.unbind(1):
        out, state = quantised.step(token, state)
        steps.append(out)
    apart = (torch.stack(steps, 1) - y).abs() > float(golden.meta["atol"])
    assert apart.float().mean() < 0.1, "the decoding path is another model"
    results = {"out.y": y, "out.y_float": block(x)}
    for ours, official in OFFICIAL_SITES.items():
        results[f"out.act.{official}"] = seen[ours]
        results[f"out.scale.{official}"] = quantised.scales[SITES.index(ours)]
    official = MambaMixer.key_map(quantised).to_official(dict(quantised.named_parameters()))
    for name, weight in official.items():
        results[f"out.weight.{name.removesuffix('.weight')}"] = weight
    return results


@adapter("quamba", "lm_w8a8_quamba")
@torch.no_grad()
def simulated_model(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    inner = {"d_state", "d_conv", "expand", "dt_rank"}
    own = {"percentile_u", "percentile_alpha", "hadamard"}
    official = {k: v for k, v in config.items() if k not in inner | own}
    official["ssm_cfg"] = {k: v for k, v in config.items() if k in inner}
    lm = MambaLMConfig.from_official({"pad_vocab_size_multiple": 1} | official)
    model = MambaForCausalLM(lm).load_official(golden.weights).eval()
    percentile = _percentile(config)
    method = Quamba(percentile=percentile, hadamard=config["hadamard"], mode="simulate")
    plan = method.plan(model, [{"input_ids": t} for t in _calibration(golden)])
    quantised, tokens = plan.apply(model), golden.inputs["input_ids"]
    results = {"out.logits": quantised(tokens), "out.logits_float": model(tokens)}
    for path, site, scale in plan_scales(plan.tensors):
        name = OFFICIAL_SITES.get(site, site)
        prefix = "q_sscan." if site == "y" else ""
        results[f"out.scale.backbone.{path}.{prefix}{name}"] = scale
    return results


def plan_scales(tensors: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    """Path, site and scale of every activation of a plan."""
    return [
        (path.removesuffix(".scales"), site, value)
        for path, values in tensors.items()
        for site, value in zip(SITES, values, strict=True)
    ]


_KERNEL_SITES = (
    "in_proj:input", "in_proj:output", "x_proj:input", "x_proj:output", "dt_proj:output",
    "out_proj:input",
)  # fmt: skip


@adapter("quamba", "int8_pipeline")
@torch.no_grad()
def integer_block(golden: Golden) -> dict[str, Tensor]:
    block = _block(golden, "d_inner", "percentile_alpha")
    scales = torch.cat([golden.inputs[f"scale.{name}"] for name in _KERNEL_SITES])
    own = calibrate_block(block, _calibration(golden), percentile=golden.config["percentile_alpha"])
    torch.testing.assert_close(activation_scales(own), scales, atol=1e-5, rtol=1e-4)
    quantised = Int8Mamba.from_float(block, scales)
    x = golden.inputs["x"]
    y, state, seen = quantised.trace(x, quantised.init_state(len(x)))
    stepped, steps = quantised.init_state(len(x)), []
    for token in x.unbind(1):
        out, stepped = quantised.step(token, stepped)
        steps.append(out)
    apart = (torch.stack(steps, 1) - y).abs() > float(golden.meta["atol"])
    assert apart.float().mean() < 0.08, "the decoding path is another model"
    results = {
        "out.y": y,
        "out.y_scan": seen["scan"],
        "out.ssm_state": state.ssm,
        "out.y_float_model": block(x),
        "out.int8.h": seen["input"],
        "out.int8.xz": seen["in_proj"],
        "out.int8.u": seen["u"],
        "out.int8.x_dbl": seen["x_proj"],
        "out.int8.dt": seen["dt_proj"],
        "out.int8.y_rotated": seen["y"],
    }
    official = {"conv": "conv1d", "a_log": "A_log", "skip": "D"}
    for name, scale in zip(WEIGHT_NAMES, quantised.weight_scales, strict=True):
        codes = getattr(quantised, name)
        codes = codes.mT[:, None] if name == "conv" else codes
        results[f"out.weight_int8.{official.get(name, name)}"] = codes
        results[f"out.weight_scale.{official.get(name, name)}"] = scale
    return results
