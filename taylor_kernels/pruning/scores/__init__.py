"""What units and blocks are ranked by: minibatches from tables of statistics, over all ranks."""
