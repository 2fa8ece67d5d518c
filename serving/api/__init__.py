"""What the API says of itself: the shape of every answer, and the OpenAPI document made of them."""
