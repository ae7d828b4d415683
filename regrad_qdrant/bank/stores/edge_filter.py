"""Filters of the Qdrant client as those of an embedded Edge shard: every condition that a server knows, but for true
and false as values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from regrad_qdrant.errors import BankError

if TYPE_CHECKING:
    from qdrant_client.models import Filter


def edge_filter(query_filter: Filter) -> Any:
    """The same filter for `qdrant_edge`.

    Raises:
        BankError: for a condition that the engine does not have.
    """
    import qdrant_edge as edge

    def conditions(group: Any) -> list[Any] | None:
        if group is None:
            return None
        return [_condition(condition) for condition in (group if isinstance(group, list) else [group])]

    minimum = query_filter.min_should
    return edge.Filter(
        must=conditions(query_filter.must),
        should=conditions(query_filter.should),
        must_not=conditions(query_filter.must_not),
        min_should=None
        if minimum is None
        else edge.MinShould([_condition(condition) for condition in minimum.conditions], minimum.min_count),
    )


def _condition(condition: Any) -> Any:
    import qdrant_edge as edge
    from qdrant_client import models

    makers: dict[type, Callable[[Any], Any]] = {
        models.Filter: edge_filter,
        models.HasIdCondition: lambda c: edge.HasIdCondition(set(c.has_id)),
        models.HasVectorCondition: lambda c: edge.HasVectorCondition(c.has_vector),
        models.IsEmptyCondition: lambda c: edge.IsEmptyCondition(c.is_empty.key),
        models.IsNullCondition: lambda c: edge.IsNullCondition(c.is_null.key),
        models.NestedCondition: lambda c: edge.NestedCondition(c.nested.key, edge_filter(c.nested.filter)),
        models.FieldCondition: _field,
    }
    return _made(makers, condition)


def _field(condition: Any) -> Any:
    import qdrant_edge as edge

    makers: dict[str, Callable[[Any], Any]] = {
        "match": _match,
        "range": _range,
        "geo_bounding_box": lambda box: edge.GeoBoundingBox(_geo_point(box.top_left), _geo_point(box.bottom_right)),
        "geo_radius": lambda circle: edge.GeoRadius(_geo_point(circle.center), circle.radius),
        "geo_polygon": lambda polygon: edge.GeoPolygon(
            _geo_line(polygon.exterior), [_geo_line(line) for line in polygon.interiors or []]
        ),
        "values_count": lambda count: edge.ValuesCount(lt=count.lt, gt=count.gt, lte=count.lte, gte=count.gte),
        "is_empty": bool,
        "is_null": bool,
    }
    given = {name: value for name, value in condition if name != "key" and value is not None}
    unknown = set(given) - set(makers)
    if unknown:
        raise BankError(f"this filter condition is not supported on an embedded Edge shard: {condition!r}")
    return edge.FieldCondition(condition.key, **{name: makers[name](value) for name, value in given.items()})


def _match(match: Any) -> Any:
    import qdrant_edge as edge
    from qdrant_client import models

    if isinstance(getattr(match, "value", None), bool):  # it would match the numbers 1 and 0 instead
        raise BankError(
            f"an embedded Edge shard can't match true and false: {match!r}; keep the field as text, or use a server"
        )
    makers: dict[type, Callable[[Any], Any]] = {
        models.MatchValue: lambda m: edge.MatchValue(m.value),
        models.MatchAny: lambda m: edge.MatchAny(m.any),
        models.MatchExcept: lambda m: edge.MatchExcept(m.except_),
        models.MatchText: lambda m: edge.MatchText(m.text),
        models.MatchTextAny: lambda m: edge.MatchTextAny(m.text_any),
        models.MatchPhrase: lambda m: edge.MatchPhrase(m.phrase),
    }
    return _made(makers, match)


def _range(bounds: Any) -> Any:
    import qdrant_edge as edge
    from qdrant_client import models

    limits = {name: getattr(bounds, name) for name in ("gte", "gt", "lte", "lt")}
    if isinstance(bounds, models.DatetimeRange):
        return edge.RangeDateTime(
            **{name: None if value is None else value.isoformat() for name, value in limits.items()}
        )
    return edge.RangeFloat(**limits)


def _geo_point(point: Any) -> Any:
    import qdrant_edge as edge

    return edge.GeoPoint(point.lon, point.lat)


def _geo_line(line: Any) -> list[Any]:
    return [_geo_point(point) for point in line.points]


def _made(makers: dict[type, Callable[[Any], Any]], given: Any) -> Any:
    if type(given) not in makers:
        raise BankError(f"this filter condition is not supported on an embedded Edge shard: {given!r}")
    return makers[type(given)](given)
