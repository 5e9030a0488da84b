"""What several tests share: tiny models, golden cases, servers, ranks."""
