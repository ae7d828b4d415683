"""One resident model for many clients, behind OpenAI's protocol: the queue, the requests, the routes and the page."""
