"""The moving average against its formula."""

import torch

from utils.training.ema import EMA


def test_average_follows_its_formula_and_swaps_in_place():
    layer = torch.nn.Linear(3, 2)
    ema = EMA(layer.named_parameters(), rate=0.9, warmup=True)
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for t in range(5):
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_()
        ema.update()
        rate = min(0.9, (1 + t) / (10 + t))
        for name, p in layer.named_parameters():
            expected[name] = rate * expected[name] + (1 - rate) * p.detach()
    own = {name: p.detach().clone() for name, p in layer.named_parameters()}
    places = [p.data_ptr() for p in layer.parameters()]
    with ema.swap():
        for name, p in layer.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name])
        assert places == [p.data_ptr() for p in layer.parameters()]
    for name, p in layer.named_parameters():
        assert torch.equal(p, own[name])


def test_without_warm_up_the_rate_is_constant():
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = EMA([("w", weight)], rate=0.75, warmup=False)
    with torch.no_grad():
        weight.fill_(1.0)
    ema.update()
    assert ema.shadow["w"].item() == 0.25
