// Etcd's own main function, built from the module proxy: `go install` refuses etcd's module for its replace directives.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
