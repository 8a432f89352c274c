"""The largest inner products with a bank, in tiles: the matrix of all of them is never stored."""

import math

import torch

QUERIES = 512  # at a time by default: with 16,384 rows of the bank, 32 MB of similarities
ROWS = 16384  # of the bank at a time


def compute_dtype(query: torch.Tensor, bank: torch.Tensor) -> torch.dtype:
    """Returns the dtype of similarities: float64 if an input is, else float32."""
    return torch.float64 if torch.float64 in (query.dtype, bank.dtype) else torch.float32


def forward(query: torch.Tensor, bank: torch.Tensor, k: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k rows of the bank with the largest inner product with each query.

    Args:
        query: [N, D], floating.
        bank: [M, D], floating.
        k: 1 to M.
        chunk: Queries at a time.

    Returns:
        Similarities [N, k], largest first, float32, or float64 if an input is; rows of the bank, int64 [N, k], the
        lower first where similarities are equal.
    """
    dtype, size = compute_dtype(query, bank), len(bank)
    # One more than wanted shows whether the last place is contested by equals, of which topk would take any.
    keep = min(k + 1, size)
    # One tile for all products: a fresh one costs the CPU as many page faults as it has pages, each time.
    tile = query.new_empty(min(chunk, len(query)) * min(ROWS, size), dtype=dtype)
    values = query.new_empty((len(query), 0), dtype=dtype)
    index = query.new_empty((len(query), 0), dtype=torch.int64)
    with torch.autocast(query.device.type, enabled=False):  # it would take the products in half precision
        for start in range(0, size, ROWS):
            columns = bank[start : start + ROWS].to(dtype).T
            parts = []
            for part in query.split(chunk):
                product = tile[: len(part) * columns.shape[1]].view(len(part), columns.shape[1])
                parts.append(_best_of_tile(torch.mm(part.to(dtype), columns, out=product), keep))
            values = torch.cat([values, torch.cat([part for part, _ in parts])], 1)
            index = torch.cat([index, torch.cat([part for _, part in parts]) + start], 1)
            if start:
                values, places = values.topk(min(keep, values.shape[1]), dim=1)
                index = index.gather(1, places)
        # Of the k largest, which are known by now, equals are still in any order: the lower row comes first.
        values, index = _by_row(values, index)
        values, places = values.sort(dim=1, descending=True, stable=True)
        index = index.gather(1, places)
        if keep > k:
            # NaN is contested too. Reading this waits for the device, once.
            contested = (values[:, k] < values[:, k - 1]).logical_not().nonzero().squeeze(1)
            for rows in contested.split(chunk):
                values[rows], index[rows] = _by_stable_sort(query[rows].to(dtype), bank, keep)
    return values[:, :k].contiguous(), index[:, :k].contiguous()


def _by_row(values: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orders each query's candidates by their row in the bank."""
    index, places = index.sort(dim=1)
    return values.gather(1, places), index


def _best_of_tile(tile: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the `keep` largest of each row of a tile and their columns, equals in any order.

    The largest lie in the groups with the largest maxima, as many groups as values: only those are searched, since
    topk takes far longer for a value than the maximum does.
    """
    columns = tile.shape[1]
    keep = min(keep, columns)
    group = 1 << max(0, round(math.log2(columns / keep) / 2))  # balances the number of groups and of their values
    groups = columns // group
    if group < 4 or groups <= keep:
        values, index = tile.topk(keep, dim=1)
        return values, index
    whole = groups * group
    grouped = tile[:, :whole].unflatten(1, (groups, group))
    chosen = grouped.amax(2).topk(keep, dim=1).indices
    candidates = grouped.gather(1, chosen[..., None].expand(-1, -1, group)).flatten(1)
    if whole < columns:
        candidates = torch.cat([candidates, tile[:, whole:]], 1)
    values, places = candidates.topk(keep, dim=1)
    within = places < keep * group
    of = chosen.gather(1, torch.where(within, places // group, 0)) * group + places % group
    return values, torch.where(within, of, places - keep * group + whole)


def _by_stable_sort(query: torch.Tensor, bank: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the same as the fast way, for any ties: a stable sort leaves equals in the order of their rows."""
    values = query.new_empty((len(query), 0))
    index = torch.empty((len(query), 0), dtype=torch.int64, device=query.device)
    for start in range(0, len(bank), ROWS):
        tile = query @ bank[start : start + ROWS].to(query.dtype).T
        rows = torch.arange(start, start + tile.shape[1], device=query.device).expand(tile.shape)
        values, index = torch.cat([values, tile], 1), torch.cat([index, rows], 1)
        values, places = values.sort(dim=1, descending=True, stable=True)
        values, index = values[:, :keep], index.gather(1, places[:, :keep])
    return values, index
