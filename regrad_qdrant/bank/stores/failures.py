"""What a failed request of the client means: to be sent again, to be asked for less, or an error of ours."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from regrad_qdrant.errors import BankError, StoreUnavailableError, UnindexedFilterError

STRICT = "Help:"  # what stands in every refusal of strict mode, which of older servers is a 403
UNINDEXED = "ndex required"  # how a server in strict mode begins when it refuses a filter
BATCH = "search batch size"  # … how it names what is too much, where it is the number of searches
TOO_LARGE = "larger than rate limiter capacity"  # … a read that it would never let pass, however long one waits
ATTEMPTS = 8
FIRST_WAIT, LONGEST_WAIT = 0.25, 20.0  # seconds; doubled after each attempt: half a minute in all
LONGEST_RETRY_AFTER = 120.0  # seconds that a server's Retry-After is followed for


def allowed(refusal: str, size: int) -> int | None:
    """How many points one read may ask for after this refusal of `size`; None where that is not what was refused."""
    if size > 1 and (named := re.search(r"[Ll]imit exceeded \d+ > (\d+)", refusal)):
        return min(int(named[1]), size - 1)
    return size // 2 if size > 1 and TOO_LARGE in refusal else None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: lost connections, time-outs (408), 429 and 5xx; no other
    4xx."""
    import grpc
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    if TOO_LARGE in str(error):
        return False
    if isinstance(error, UnexpectedResponse):
        return error.status_code in (408, 429) or (error.status_code or 0) >= 500
    if isinstance(error, grpc.RpcError):
        codes = grpc.StatusCode
        passing = (codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED, codes.RESOURCE_EXHAUSTED, codes.ABORTED, codes.INTERNAL)
        return getattr(error, "code", lambda: None)() in passing
    return isinstance(error, ResponseHandlingException | ResourceExhaustedResponse | ConnectionError)


def retrying(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call with exponential back-off and jitter between attempts, or after as long as the server asks for; the last
    error is raised as it is."""
    from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

    back_off = wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT) + wait_random(0, FIRST_WAIT)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(back_off(state), min(float(getattr(error, "retry_after_s", 0.0)), LONGEST_RETRY_AFTER))

    attempts = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait,
        stop=stop_after_attempt(ATTEMPTS),
        reraise=True,
    )
    return attempts(function, *arguments, **options)


def _refused(collection: str, code: Any, said: str) -> BankError:
    """The error of a request that the server refused; strict mode's want of an index has one of its own."""
    kind = UnindexedFilterError if UNINDEXED in said else BankError
    return kind(f"collection {collection!r}: the server answered {code}: {said}")


@contextlib.contextmanager
def client_errors(collection: str) -> Iterator[None]:
    """Sort what the client raises into ours; the message keeps what the server said."""
    import grpc
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    unknown = StoreUnavailableError("the Qdrant server refused the API key: set QDRANT_API_KEY")

    def forbidden(said: Any) -> BankError:
        return BankError(
            f"collection {collection!r}: this API key may not do that: use one with write access to it ({said})"
        )

    try:
        yield
    except ResourceExhaustedResponse as error:
        if TOO_LARGE in str(error):
            raise BankError(f"collection {collection!r}: {error}") from error
        raise StoreUnavailableError(
            f"the Qdrant server is over its rate limit, still after retries: {error}"
        ) from error
    except grpc.RpcError as error:
        code = getattr(error, "code", lambda: None)()
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise unknown from error
        said = getattr(error, "details", lambda: None)() or error
        if code == grpc.StatusCode.PERMISSION_DENIED and STRICT not in str(said):
            raise forbidden(said) from error
        if is_transient(error):
            raise StoreUnavailableError(f"can't reach the Qdrant server, still after retries: {error}") from error
        raise _refused(collection, code, str(said)) from error
    except (ResponseHandlingException, ConnectionError) as error:
        raise StoreUnavailableError(
            f"can't reach the Qdrant server: {error}. Is it running, and is the URL right?"
        ) from error
    except UnexpectedResponse as error:
        if error.status_code == 401:
            raise unknown from error
        said = error.content.decode(errors="replace")[:300]
        if error.status_code == 403 and STRICT not in said:
            raise forbidden(said) from error
        if is_transient(error):
            raise StoreUnavailableError(
                f"the Qdrant server answered {error.status_code}, still after retries: {said}"
            ) from error
        raise _refused(collection, error.status_code, said) from error
    except (ValueError, KeyError) as error:  # what the in-process engine raises
        raise BankError(f"collection {collection!r}: {error}") from error
