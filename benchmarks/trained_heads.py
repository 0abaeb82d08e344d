"""Train the small networks of the label benchmarks and say how confident they became."""

import torch
from heads.training import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
