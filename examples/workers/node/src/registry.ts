import { setTimeout as sleep } from "node:timers/promises";

import { Etcd3, type Lease } from "etcd3";

import { Instance, ModelCard } from "./gen/dynamo_grpc/v1/model_card.js";

const LEASE_S = 10;

/** Instance and card in etcd, under a lease; and again, in a new epoch, when the lease was lost. */
export class Registration {
  private readonly client = new Etcd3({ hosts: (process.env.ETCD_ENDPOINTS || "localhost:2379").split(",") });
  private lease?: Lease;
  private isEnding = false;

  constructor(
    private readonly instance: Instance,
    private readonly card: ModelCard,
  ) {}

  /** Returns when it is registered for the first time; a registry that doesn't answer is asked again. */
  async start(): Promise<void> {
    while (!this.isEnding) {
      try {
        return await this.register();
      } catch (error) {
        console.error("not registered:", (error as Error).message);
        await sleep(1000);
      }
    }
  }

  private async register(): Promise<void> {
    const { namespace, component, endpoint, instanceId } = this.instance;
    const rest = `${namespace}/${component}/${endpoint}/${instanceId.toString(16).padStart(16, "0")}`;
    this.instance.registeredAt = new Date();
    const lease = this.client.lease(LEASE_S);
    await lease.put(`/dynamo_grpc/v1/models/${rest}`).value(JSON.stringify(ModelCard.toJSON(this.card)));
    await lease.put(`/dynamo_grpc/v1/instances/${rest}`).value(JSON.stringify(Instance.toJSON(this.instance)));
    this.lease = lease;
    lease.once("lost", () => this.again());
  }

  private async again(): Promise<void> {
    this.instance.epoch += 1n;
    await this.start();
  }

  async end(): Promise<void> {
    this.isEnding = true;
    try {
      await Promise.race([this.lease?.revoke(), sleep(2000)]); // its keys go at once
    } catch (error) {
      console.error("leaving the registry:", (error as Error).message);
    }
    this.client.close();
  }
}
