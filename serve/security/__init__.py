"""Who may do what: keys, hosts, proxies and limits."""
