"""The choice of arithmetic: which precision a device gets, with a reason for every other one."""

from __future__ import annotations

import pytest

from svdq import kernels
from svdq.kernels import BackendUnavailable, backend_for, explain
from svdq.kernels.device import Device

AMPERE = Device("cuda", "NVIDIA GeForce RTX 3090", (8, 6), 24 << 30)
HOPPER = Device("cuda", "NVIDIA H200", (9, 0), 139 << 30)
TURING = Device("cuda", "NVIDIA GeForce RTX 2080", (7, 5), 8 << 30)
RADEON = Device("hip", "AMD Radeon RX 7900", memory=24 << 30)
CPU = Device("cpu", "CPU")


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVDQ_BACKEND", raising=False)
    monkeypatch.setattr(kernels, "triton_problem", lambda: None)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_int4_tensor_cores_are_used(with_triton: None, capability: tuple[int, int]) -> None:
    device = Device("cuda", "a GPU", capability)
    for precision in ("auto", "int4"):
        backend = backend_for(device, precision)
        assert (backend.precision, backend.kernels) == ("int4", True)
    assert backend_for(device, "16bit").precision == "16bit"


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_newer_gpus_get_int8(with_triton: None, capability: tuple[int, int]) -> None:
    backend = backend_for(Device("cuda", "a GPU", capability))
    assert (backend.precision, backend.kernels) == ("int8", True)
    assert backend_for(AMPERE, "int8").kernels


@pytest.mark.parametrize(
    ("device", "precision", "reason"),
    [
        (HOPPER, "int8", "sm_90 has no INT4"),
        (TURING, "16bit", "sm_75 has no INT4"),
        (RADEON, "16bit", "AMD Radeon"),
        (CPU, "16bit", "this device is CPU"),
    ],
)
def test_other_devices_get_a_reason(with_triton: None, device: Device, precision: str, reason: str) -> None:
    assert backend_for(device).precision == precision
    with pytest.raises(BackendUnavailable, match=f"precision int4 cannot run here: .*{reason}.*Choose auto or one of"):
        backend_for(device, "int4")
    assert all(choice.reason for choice in explain(device))


def test_without_triton_the_reason_says_what_to_install(with_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "triton_problem", lambda: "Triton is not installed (pip install triton)")
    assert backend_for(AMPERE).precision == "16bit"
    with pytest.raises(BackendUnavailable, match="Triton is not installed"):
        backend_for(AMPERE, "int4")


@pytest.mark.parametrize(
    ("device", "value", "expected"),
    [
        (HOPPER, "int4", ("int4", True)),
        (HOPPER, "int4-reference", ("int4", False)),
        (HOPPER, "16bit", ("16bit", False)),
        (AMPERE, "int4-reference", ("int4", False)),
        (TURING, "int4", ("int4", False)),
        (CPU, "int4", ("int4", False)),
    ],
)
def test_forced(
    with_triton: None, monkeypatch: pytest.MonkeyPatch, device: Device, value: str, expected: tuple[str, bool]
) -> None:
    monkeypatch.setenv("SVDQ_BACKEND", value)
    backend = backend_for(device, "auto")
    assert (backend.precision, backend.kernels) == expected
    assert f"SVDQ_BACKEND={value}" in backend.reason


def test_a_wrong_force_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDQ_BACKEND", "fp4")
    with pytest.raises(BackendUnavailable, match="SVDQ_BACKEND is 'fp4', expected int4, int4-reference or 16bit"):
        backend_for(CPU)


def test_what_triton_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    problem = kernels.triton_problem.__wrapped__
    monkeypatch.setenv("CC", "cc")
    assert problem() is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert "C compiler" in problem()

    def no_triton(name: str, package: str | None = None):
        raise ImportError(name)

    monkeypatch.setattr(kernels.importlib, "import_module", no_triton)
    assert "not installed" in problem()
