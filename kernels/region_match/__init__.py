"""The op `region_match` and its relatives; its README has the mathematics, the support matrix and the costs."""

from .op import nearest_neighbors, region_match, region_match_crops

__all__ = ["nearest_neighbors", "region_match", "region_match_crops"]
