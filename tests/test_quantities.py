import pytest

from hf_sdp import SDPConfigError
from hf_sdp.quantities import bits_per_second, bytes_per_second, flops_per_second


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10Gbit", 1.25e9), ("25GB/s", 25e9), ("800Mbit", 1e8), ("100Gbps", 12.5e9), ("1GiB/s", 2**30),
        ("16b", 2), ("16B", 16), ("3 bytes/s", 3), (" 1e3 Kibit/s ", 128e3),
    ],
)  # fmt: skip
def test_bytes_per_second(text, expected):
    assert bytes_per_second(text) == expected


def test_bits_per_second():
    assert bits_per_second("1Gbit") == 1e9 and bits_per_second("2.5 mbit/s") == 2.5e6


@pytest.mark.parametrize(
    ("text", "expected"), [("100e12", 1e14), ("100TFLOPS", 1e14), ("1.5 PFLOP/s", 1.5e15), ("2eflops", 2e18)]
)
def test_flops_per_second(text, expected):
    assert flops_per_second(text) == expected


@pytest.mark.parametrize("text", ["", "10", "-1Gbit", "0Mbit", "1e400Gbit", "10Gfoo", "5parsec", "1Eib", "Gbit"])
def test_what_is_no_bandwidth_is_refused_with_the_remedy(text):
    with pytest.raises(SDPConfigError, match=f"^'{text}' is no bandwidth. .* such as 10Gbit, 800Mbit or 25GB/s.$"):
        bytes_per_second(text)


@pytest.mark.parametrize("text", ["fast", "-1e12", "0", "100TFLOPS/s/s", "10Gbit"])
def test_what_is_no_speed_of_computation_is_refused_with_the_remedy(text):
    with pytest.raises(SDPConfigError, match=f"^'{text}' is no speed of computation. .* such as 100TFLOPS or 100e12.$"):
        flops_per_second(text)
