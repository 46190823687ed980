"""Pictures of blocks and the edges between them, as SVG for notebooks."""

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from dnw_graph.topology.role import Role

MOST = 40  # blocks in a picture
COLORS = {Role.INPUT: "#4c78a8", Role.HIDDEN: "#9d9d9d", Role.OUTPUT: "#e45756"}
HEIGHT, MIDDLE, TALLEST = 230, 150, 110


def draw_blocks(
    sizes: Sequence[int], roles: Sequence[Role], edges: NDArray[np.int64], caption: str
) -> str:
    """Return HTML with a caption, and a picture of blocks from left to right.

    The height of a block grows with its number of nodes, the width of a line with the number of
    edges. Lines that skip blocks are curved.

    Args:
        sizes: Number of nodes of each block ``[n]``.
        roles: Role of each block ``[n]``.
        edges: Number of edges from block to block ``[n, n]``.
        caption: Text above the picture.
    """
    text = f"<div>{escape(caption)}</div>"
    if not 0 < len(sizes) <= MOST:
        return text
    step = min(90, 880 // len(sizes))
    x = [20 + step * i + step // 2 for i in range(len(sizes))]
    heights = [10 + (TALLEST - 10) * (size / max(sizes)) ** 0.5 for size in sizes]
    top = [MIDDLE - round(height / 2) for height in heights]
    shapes = []
    for u, v in np.argwhere(edges).tolist():
        width = 0.6 + 6 * float(edges[u, v] / edges.max()) ** 0.5
        if abs(v - u) == 1:
            path = f"M{x[u] + 6},{MIDDLE} L{x[v] - 6},{MIDDLE}"
        else:  # from above a block to above another one, or around one
            above = min(top[u], top[v]) - min(115, 24 + 15 * abs(v - u))
            aside = 20 if u == v else 0
            path = (
                f"M{x[u] - aside // 4},{top[u]} C{(3 * x[u] + x[v]) / 4 - aside},{above} "
                f"{(x[u] + 3 * x[v]) / 4 + aside},{above} {x[v] + aside // 4},{top[v]}"
            )
        shapes.append(
            f'<path d="{path}" fill="none" stroke="#3b6ea5" stroke-opacity="0.45" '
            f'stroke-width="{width:.1f}"><title>{edges[u, v]:,} edges from block {u} to block {v}'
            "</title></path>"
        )
    for at, (size, role, height) in enumerate(zip(sizes, roles, heights, strict=True)):
        shapes.append(
            f'<rect x="{x[at] - 6}" y="{top[at]}" width="12" '
            f'height="{height:.0f}" rx="3" fill="{COLORS[role]}"><title>block {at}: {size:,} '
            f"{role.name.lower()} nodes</title></rect>"
            f'<text x="{x[at]}" y="{MIDDLE + TALLEST // 2 + 18}" font-size="10" fill="#777" '
            f'text-anchor="middle">{size:,}</text>'
        )
    area = f'width="{x[-1] + step // 2 + 20}" height="{HEIGHT}"'
    return f'{text}<svg xmlns="http://www.w3.org/2000/svg" {area}>{"".join(shapes)}</svg>'
