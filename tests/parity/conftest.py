"""A small network with every kind of layer."""

import pytest


@pytest.fixture
def mixed():
    """Return an embedding, two convolutions, a norm and linear layers, with biases."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn = torch.nn

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(31, 12)
            self.conv1 = nn.Conv1d(12, 10, 3, padding=1)
            self.conv2 = nn.Conv2d(1, 6, 3, padding=1)
            self.norm = nn.LayerNorm(60)
            self.wide = nn.Linear(60, 20)
            self.head = nn.Linear(20, 7)

        def forward(self, ids):
            x = self.conv1(self.table(ids).transpose(1, 2))
            x = self.conv2(x[:, None]).mean(-1).flatten(1)
            return self.head(torch.relu(self.wide(self.norm(x))))

    return Mixed().eval()
