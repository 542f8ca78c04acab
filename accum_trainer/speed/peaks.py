"""Peak rates of devices, for the utilisation of what they could do.

Dense rates in 10^12 operations per second, as the makers' data sheets give them. Where a sheet
states the rate with 2:4 sparsity, half of it stands here. Knows no model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DevicePeak:
    """One kind of device.

    Attributes:
        name: whole words of every name that its driver gives it, in lower case.
        half: bf16 and fp16 with float32 accumulation; a device without bf16 runs fp16 at it.
        tf32: float32 matmuls in TF32; None if it has none.
        single: float32.
        source: the maker's document.
    """

    name: str
    half: float
    tf32: float | None
    single: float
    source: str


# The first row whose name is part of the device's counts, so longer names stand first.
PEAKS = (
    DevicePeak("gb200", 2500, 1250, 80, "NVIDIA GB200 NVL72 data sheet, per GPU"),
    DevicePeak("b200", 2250, 1125, 75, "NVIDIA HGX B200 data sheet, per GPU"),
    DevicePeak("gh200", 989.5, 494.5, 67, "NVIDIA GH200 data sheet"),
    DevicePeak("h200 nvl", 835.5, 417.5, 60, "NVIDIA H200 data sheet"),
    DevicePeak("h200", 989.5, 494.5, 67, "NVIDIA H200 data sheet"),
    DevicePeak("h100 nvl", 835.5, 417.5, 60, "NVIDIA H100 data sheet, NVL"),
    DevicePeak("h100 pcie", 756, 378, 51, "NVIDIA H100 data sheet, PCIe"),
    DevicePeak("h100", 989.5, 494.5, 67, "NVIDIA H100 data sheet, SXM"),
    DevicePeak("a100", 312, 156, 19.5, "NVIDIA A100 data sheet"),
    DevicePeak("a30", 165, 82, 10.3, "NVIDIA A30 data sheet"),
    DevicePeak("a40", 149.7, 74.8, 37.4, "NVIDIA A40 data sheet"),
    DevicePeak("rtx a6000", 154.8, 77.4, 38.7, "NVIDIA RTX A6000 data sheet"),
    DevicePeak("l40s", 362.05, 183, 91.6, "NVIDIA L40S data sheet"),
    DevicePeak("l40", 181.05, 90.5, 90.5, "NVIDIA L40 data sheet"),
    DevicePeak("l4", 121, 60, 30.3, "NVIDIA L4 data sheet"),
    DevicePeak("v100-pcie", 112, None, 14, "NVIDIA V100 data sheet, PCIe"),
    DevicePeak("v100-sxm2", 125, None, 15.7, "NVIDIA V100 data sheet, SXM2"),
    DevicePeak("t4", 65, None, 8.1, "NVIDIA T4 data sheet"),
    DevicePeak("rtx 5090", 209.5, 104.8, 104.8, "NVIDIA RTX Blackwell GPU architecture, app. A"),
    DevicePeak("rtx 4090", 165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture, appendix A"),
    DevicePeak("rtx 3090 ti", 80, 40, 40, "NVIDIA GA102 architecture, appendix A"),
    DevicePeak("rtx 3090", 71, 35.6, 35.6, "NVIDIA GA102 architecture, appendix A"),
    DevicePeak("mi325x", 1307.4, 653.7, 163.4, "AMD Instinct MI325X data sheet"),
    DevicePeak("mi300x", 1307.4, 653.7, 163.4, "AMD Instinct MI300X data sheet"),
)


# A share of a device, and others that a table's name is part of.
_OTHER = r"\bmig\b|\blaptop\b|\bmax-q\b|\bd$"


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """Operations per second that `device` can do at most; None if that is not known.

    A share of a GPU (MIG) and a CPU are not known.

    Args:
        mixed_precision: "bf16", "fp16" or "no".
    """
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), _arithmetic(mixed_precision))


def _arithmetic(mixed_precision: str) -> str:
    if mixed_precision != "no":
        return "half"
    return "single" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def peak_of(name: str, arithmetic: str) -> float | None:
    """Operations per second of the device that its driver calls `name`; None if not in the table.

    Args:
        arithmetic: a column of the table, `half`, `tf32` or `single`.
    """
    lower = name.lower()
    if re.search(_OTHER, lower):
        return None
    row = next((p for p in PEAKS if re.search(rf"(?<!\w){p.name}(?!\w)", lower)), None)
    if row is None:
        return None
    rates = {"half": row.half, "tf32": row.tf32 or row.single, "single": row.single}
    return rates[arithmetic] * 1e12
