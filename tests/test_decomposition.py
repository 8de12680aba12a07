"""The algebra on plain tensors, against the two-part formulas written out."""

import torch

from circuits import decomposition as d


def parts(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, *shape, generator=generator), torch.randn(*shape, generator=generator)


def test_linear_gives_the_bias_away_in_proportion():
    beta, total = parts(7)
    weight, bias = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)), torch.arange(4.0)
    relevant, rest = beta @ weight.T, (total - beta) @ weight.T
    share = relevant.abs() / (relevant.abs() + rest.abs())
    out = d.linear(beta, weight, bias, total @ weight.T + bias)
    torch.testing.assert_close(out, relevant + share * bias)
    torch.testing.assert_close(d.linear(beta, weight, bias), relevant)


def test_both_parts_of_a_linear_map_make_the_activation():
    beta, total = parts(7)
    weight, bias = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)), torch.arange(4.0)
    whole = total @ weight.T + bias
    torch.testing.assert_close(
        d.linear(beta, weight, bias, whole) + d.linear(total - beta, weight, bias, whole), whole.expand(5, 4)
    )


def test_norm_uses_the_totals_scale_and_weighs_the_bias_by_its_inputs():
    beta, total = parts(6)
    weight, bias = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)
    scale = torch.rsqrt(total.var(-1, correction=0, keepdim=True) + 1e-5)
    rest = total - beta
    share = beta.abs() / (beta.abs() + rest.abs())
    expected = (beta - beta.mean(-1, keepdim=True)) * scale * weight
    torch.testing.assert_close(d.norm(beta, total, scale, weight, bias, centred=True), expected)
    split = d.norm(beta, total, scale, weight, bias, centred=True, split_bias=True)
    torch.testing.assert_close(split, expected + share * bias)
    other = d.norm(rest, total, scale, weight, bias, centred=True, split_bias=True)
    normed = torch.nn.functional.layer_norm(total, (6,), weight, bias)
    torch.testing.assert_close(split + other, normed.expand(5, 6))


def test_stabilise_gives_the_sum_to_the_larger_part():
    beta, total = parts(50)
    rest = total - beta
    clash = beta * rest < 0
    assert 0 < clash.sum() < clash.numel()
    expected = torch.where(clash, torch.where(beta.abs() > rest.abs(), total.expand_as(beta), 0.0), beta)
    torch.testing.assert_close(d.stabilise(beta, total), expected)


def test_activation_and_gate_parts_make_the_product():
    beta_g, total_g = parts(9)
    beta_u, total_u = parts(9, seed=1)
    f = torch.nn.functional.silu
    assert torch.equal(d.activation(beta_g, total_g, f(total_g), f), f(total_g) - f(total_g - beta_g))
    rest = (total_g - beta_g) * (total_u - beta_u)
    torch.testing.assert_close(
        d.gate(beta_g, beta_u, total_g, total_u, strict=False) + rest, (total_g * total_u).expand(5, 9)
    )
    assert torch.equal(d.gate(beta_g, beta_u, total_g, total_u, strict=True), beta_g * beta_u)


def test_relevant_pattern_is_uniform_where_no_query_is_relevant():
    keys = parts(3, 4)[0]
    allowed = torch.ones(3, 3, dtype=torch.bool).tril()
    pattern = d.relevant_pattern(torch.zeros(5, 3, 4), keys, 0.5, allowed)
    expected = torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(pattern, expected.expand(5, 3, 3))


def test_relevant_pattern_counts_earlier_keys_that_hold_nothing():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 4, generator=generator), torch.randn(3, 4, generator=generator)
    whole = torch.cat((torch.zeros(2, 4), keys))
    allowed = torch.ones(2, 5, dtype=torch.bool).tril(3)
    short = d.relevant_pattern(queries, keys, 0.5, allowed, softcap=2.0)
    torch.testing.assert_close(short, d.relevant_pattern(queries, whole, 0.5, allowed, softcap=2.0)[:, 2:])
