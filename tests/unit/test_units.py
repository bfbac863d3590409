import pytest

from pipeline.config.schema import ConfigError
from pipeline.config.units import parse_address, parse_duration, parse_rate, parse_size


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [("10mbit", 1e7), ("10Mbit", 1e7), (" 2.5 gbit ", 2.5e9), ("64kbit", 64e3), ("9600bit", 9600), ("9600", 9600)],
)
def test_rates_are_in_tcs_notation(text, bits_per_s):
    assert parse_rate(text) == pytest.approx(bits_per_s, rel=1e-12)


@pytest.mark.parametrize(("text", "seconds"), [("20ms", 0.02), ("1.5s", 1.5), ("300us", 3e-4), ("0", 0), ("0ms", 0)])
def test_times(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        *[("8GiB", 8 * 2**30), ("8gib", 8 * 2**30), ("0.5 MiB", 2**19), ("3KiB", 3072)],
        *[("2GB", 2 * 10**9), ("2MB", 2 * 10**6), ("2kB", 2000), ("7B", 7), ("0", 0)],
    ],
)
def test_sizes_tell_decimal_from_binary_prefixes(text, nbytes):
    size = parse_size(text)
    assert size == nbytes and isinstance(size, int)


@pytest.mark.parametrize("parse", [parse_rate, parse_duration, parse_size])
@pytest.mark.parametrize(
    "text",
    ["", "fast", "-1ms", "-1mbit", "-1B", "1e3", "nan", "inf", "1,5s", "١s", "1 2", ".5s", "1m", "1mibit", "1mbps"],
)
def test_other_text_is_refused_with_the_units(parse, text):
    unit = {parse_rate: "mbit", parse_duration: "ms", parse_size: "GiB"}[parse]
    with pytest.raises(ConfigError, match=f"is not a .*{unit}"):
        parse(text)


def test_each_kind_has_its_own_units():
    for parse, text in [(parse_rate, "1s"), (parse_rate, "1GiB"), (parse_duration, "1bit"), (parse_size, "1ms")]:
        with pytest.raises(ConfigError, match=f"'{text}' is not a"):
            parse(text)


def test_a_number_alone_is_no_time_and_no_size():
    for parse in (parse_duration, parse_size):
        with pytest.raises(ConfigError, match="'20' is not a"):
            parse("20")


def test_a_link_without_any_rate_is_refused():
    with pytest.raises(ConfigError, match="at least 1 bit/s"):
        parse_rate("0mbit")


def test_numbers_beyond_all_records_are_refused():
    with pytest.raises(ConfigError, match="too large"):
        parse_rate("9999999999gbit")
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size("1" * 400 + "B")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        (" localhost:0 ", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
    ],
)
def test_addresses(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", ":", "8000", ":8000", "host:", "host:65536", "host:-1", "::1:80", "a b:1", "h:²"])
def test_what_is_no_address(text):
    with pytest.raises(ConfigError, match="is no address: write HOST:PORT"):
        parse_address(text)
