"""The products in parts of the vocabulary, against plain products in float64."""

from __future__ import annotations

import pytest
import torch

from mopd_kernels import products
from mopd_kernels.projection import Buffers
from tests.kernels.counters import Products

C, H = 6, 5
WHOLE, CUT = 100, products.PARTS * products.LEAST_ROWS + 7  # vocabularies taken as one product, and in parts


def plane(vocabulary, column_major, dtype):
    return Buffers(C, vocabulary, torch.empty(0, dtype=dtype), 1, column_major).logits(0, C - 1)  # a smaller last chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("column_major", [True, False])
@pytest.mark.parametrize("vocabulary", [WHOLE, CUT])
def test_products(vocabulary, column_major, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(vocabulary, H, dtype=dtype), torch.randn(vocabulary, dtype=dtype)
    hidden, before = torch.randn(C - 1, H, dtype=dtype), torch.randn(vocabulary, H, dtype=dtype)
    h, w = hidden.double(), weight.double()
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    z = plane(vocabulary, column_major, dtype)
    with Products() as seen:
        products.logits_(z, hidden, weight, None)
    in_parts = column_major and vocabulary == CUT
    assert len(seen.shapes) == (products.PARTS + 1 if in_parts else 1)
    torch.testing.assert_close(z.double(), h @ w.T, **tolerance)
    products.logits_(z, hidden, weight, bias)
    expected = h @ w.T + bias.double()
    torch.testing.assert_close(z.double(), expected, **tolerance)
    torch.testing.assert_close(products.hidden_gradient(z, weight).double(), expected @ w, **tolerance)
    for add in (False, True):
        out = before.clone() if add else torch.full_like(before, float("nan"))
        products.weight_gradient_(out, z, hidden, 0.5, add)
        product = 0.5 * expected.T @ h
        torch.testing.assert_close(out.double(), before.double() + product if add else product, **tolerance)


def test_more_threads_than_parts_take_one_product(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: products.PARTS + 1)
    with Products() as seen:
        products.hidden_gradient(torch.ones(CUT, C).T, torch.ones(CUT, H))
    assert seen.shapes == [(C, CUT, H)]
