"""Requests made from the server's own description, sensible and not: none is a fault of the server's."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from servers import served, server  # noqa: F401 # fixtures

ROUTES = ["POST /v1/chat/completions", "POST /v1/completions", "POST /v1/search", "GET /v1/models", "GET /ready"]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", ROUTES)
def test_no_request_is_a_fault_of_the_servers(server, route, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    method, path = route.split()
    operation = schema[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("nothing can be wrong with it")

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def asked(case):
        response = case.call()
        assert response.status_code < 500, (response.status_code, response.text, case.body)

    asked()
